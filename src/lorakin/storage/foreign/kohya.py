"""kohya's sd-scripts and LyCORIS: tensors by a model's prefix and a path with underscores for dots.

    <prefix>_<path>.lora_down.weight (r, in, kernel…)    <prefix>_<path>.alpha ()
    <prefix>_<path>.lora_up.weight (out, r, 1…)          <prefix>_<path>.dora_scale (out, 1…)

If alpha is missing, or 0, it is r.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakin.errors import AdapterError, some
from lorakin.inject import layer_kinds
from lorakin.storage.foreign.foreign_file import ForeignAdapter, ForeignFile
from lorakin.storage.peft.formats import DOWN, MAGNITUDE, UP

KEY = re.compile(
    r"(?P<model>lora_(?:unet|te\d?|transformer|prior_unet)|lycoris)_(?P<path>[^.]+)\.(?P<rest>.+)"
)
ANOTHER_METHOD = {
    "lora_mid": "a Tucker decomposition (LoCon with lora_mid)",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "diff": "a full difference of the weights",
    "a1.": "GLoRA",
    "on_input": "(IA)³",
    "w_norm": "trained norms",
}
"""Beginning of a tensor's name → the method that has it."""


def read(source: ForeignFile) -> ForeignAdapter:
    """Returns the adapter in a file of kohya's; if it is for several models, the part for this."""
    by_model: dict[str, dict[str, Tensor]] = {}
    rest = []
    for key, tensor in source.tensors.items():
        if part := KEY.fullmatch(key):
            by_model.setdefault(part["model"], {})[key.removeprefix(f"{part['model']}_")] = tensor
        else:
            rest.append(key)
    if rest:
        raise source.error(
            f"tensors that belong to nothing: {some(rest)}; the file is damaged or of another kind"
        )
    paths = _flat_paths(source)
    adapter: dict[str, ForeignAdapter] = {}
    errors: dict[str, AdapterError] = {}
    for model, tensors in by_model.items():
        try:
            adapter[model] = _part(dataclasses.replace(source, tensors=tensors), paths)
        except AdapterError as error:
            errors[model] = error
    if len(adapter) > 1:
        raise source.error(
            f"its parts {' and '.join(adapter)} both fit this model; keep one of them in the file"
        )
    if not adapter:
        known = {m: sum(k.partition(".")[0] in paths for k in own) for m, own in by_model.items()}
        raise errors[max(errors, key=lambda model: known[model])]
    ((_, fitting),) = adapter.items()
    for other, reason in errors.items():
        fitting.notes.append(
            f"the {len(by_model[other])} tensors of {other} were left out, as another model's: "
            f"{reason}"
        )
    return fitting


def _flat_paths(source: ForeignFile) -> dict[str, list[str]]:
    """Returns name with underscores for dots → the paths of the modules that it can mean."""
    paths: dict[str, list[str]] = {}
    # In transformers 5 a CLIPTextModel has no text_model any more; files still have it.
    is_clip = "text_model" not in source.modules
    for path, module in source.modules.items():
        if layer_kinds.kind_of(module) is not None:
            flat = path.replace(".", "_")
            for name in (flat, f"text_model_{flat}") if is_clip else (flat,):
                paths.setdefault(name, []).append(path)
    return paths


def _part(source: ForeignFile, paths: Mapping[str, list[str]]) -> ForeignAdapter:
    """Returns the part of a file that belongs to one model."""
    for key in source.tensors:
        name = key.partition(".")[2]
        other = next(
            (what for start, what in ANOTHER_METHOD.items() if name.startswith(start)), None
        )
        if other:
            raise source.error(f"{key} belongs to {other}, which is not a low-rank pair")
    adapter = ForeignAdapter("kohya/LyCORIS", {}, {}, [])
    endings = {
        "lora_down.weight": DOWN,
        "lora_up.weight": UP,
        "alpha": "alpha",
        "dora_scale": MAGNITUDE,
    }
    for name, slots in source.split(endings).items():
        path = _path(source, name, paths)
        rank, alpha = len(slots[DOWN]), slots.pop("alpha", torch.zeros(()))
        if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(alpha):
            raise source.error(f"{name}.alpha is {alpha.tolist()}, expected one number")
        _check_shapes(source, name, path, slots)
        flat = {
            slot: t.flatten() if slot == MAGNITUDE else t.flatten(1) for slot, t in slots.items()
        }
        adapter.slots[path] = source.checked(path, flat)
        adapter.scales[path] = source.scale(path, rank, [float(alpha) / rank or 1.0])
    return adapter


def _path(source: ForeignFile, name: str, paths: Mapping[str, list[str]]) -> str:
    """Returns the path of the one module that a flat name means."""
    kind = type(source.model).__name__
    if name not in paths:
        raise source.error(
            f"it is for another base model: it adapts {name}, but this {kind} has no layer of that "
            "name, with underscores for dots"
        )
    if len(paths[name]) > 1:
        raise source.error(f"{name} can mean {' or '.join(paths[name])} in this {kind}")
    (path,) = paths[name]
    return path


def _check_shapes(source: ForeignFile, name: str, path: str, slots: Mapping[str, Tensor]) -> None:
    """Checks that the kernel is the module's, and that magnitudes lie along the outputs."""
    module, shape = source.module(path)
    if shape.lookup:
        raise source.error(f"it adapts {path}, an embedding, for which kohya's format has no form")
    if MAGNITUDE in slots and slots[MAGNITUDE].shape != (
        shape.outputs,
        *(1 for _ in slots[MAGNITUDE].shape[1:]),
    ):
        raise source.error(
            f"{name}.dora_scale has shape {tuple(slots[MAGNITUDE].shape)}: magnitudes along the "
            f"inputs are another method's, expected one for each of the {shape.outputs} outputs"
        )
    kernel, own = slots[DOWN].shape[2:], tuple(getattr(module, "kernel_size", ()))
    if kernel != own and not math.prod(kernel) == math.prod(own) == 1:
        raise source.error(
            f"{name}.lora_down.weight has a kernel of {tuple(kernel)}, but that of {path} is {own}"
        )
