"""A file of another library: its tensors, matched with modules of the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError, some
from lorakin.family import Shape, all_finite
from lorakin.inject import layer_kinds
from lorakin.storage.peft.formats import DOWN, MAGNITUDE, UP
from lorakin.storage.schema import Finite, SchemaError, checked

CONFIG = "adapter_config.json"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of another library's file, with the model's paths."""

    format: str
    """The library."""
    slots: dict[str, dict[str, Tensor]]
    """Path → `A` (r, inputs), `B` (outputs, r) and perhaps `m` (outputs,), in the file's dtype."""
    scales: dict[str, float]
    """Path → s of the change s·B·A."""
    notes: list[str]
    """What the user should know."""


@dataclasses.dataclass(frozen=True)
class ForeignFile:
    """A file of another library, and the model that it is for."""

    where: str
    """The file, for messages."""
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    """The content of the config in the same directory; {} without one."""
    model: nn.Module
    modules: Mapping[str, nn.Module]
    alpha: float | None
    """The alpha that the user gave."""

    def error(self, message: str) -> AdapterError:
        """Returns an error about the file."""
        return AdapterError(f"{self.where}: {message}")

    def split(self, endings: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors by path and slot; raises `AdapterError` for unknown or missing ones.

        `endings`: ending of a key → slot; the first two are those of A and B.
        """
        slots: dict[str, dict[str, Tensor]] = {}
        rest = []
        for key, tensor in self.tensors.items():
            ending = next((ending for ending in endings if key.endswith(f".{ending}")), None)
            if ending is None:
                rest.append(key)
            else:
                slots.setdefault(key.removesuffix(f".{ending}"), {})[endings[ending]] = tensor
        if rest:
            raise self.error(
                f"unknown tensors: {some(rest)}; the file is damaged or of another kind"
            )
        for path, of_module in slots.items():
            if absent := [end for end in list(endings)[:2] if endings[end] not in of_module]:
                raise self.error(
                    f"{path} lacks {', '.join(absent)}; the file is damaged or incomplete"
                )
            if flat := [slot for slot in (DOWN, UP) if of_module[slot].ndim < 2]:
                shape = tuple(of_module[flat[0]].shape)
                raise self.error(f"{flat[0]} of {path} has shape {shape}, expected a matrix")
        return slots

    def module(self, path: str) -> tuple[nn.Module, Shape]:
        """Returns the module at `path`, and the shape of its weight as a matrix."""
        if path not in self.modules:
            raise self.error(
                f"it is for another base model: it adapts {path}, which this "
                f"{type(self.model).__name__} does not have"
            )
        module = self.modules[path]
        if reason := layer_kinds.refusal(module):
            raise self.error(f"it adapts {path}, but that is {reason}")
        kind = layer_kinds.kind_of(module)
        assert kind is not None
        return module, kind.shape(module)

    def checked(self, path: str, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the slots if they are finite, dense and fit the weight at `path`."""
        _, shape = self.module(path)
        for slot, tensor in slots.items():
            if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
                raise self.error(
                    f"{slot} of {path} is {tensor.dtype} ({tensor.layout}), expected a dense "
                    "floating tensor"
                )
            if not all_finite(tensor):
                raise self.error(f"{slot} of {path} holds NaN or infinity")
        if not _fits(slots, shape):
            have = ", ".join(f"{slot} {tuple(t.shape)}" for slot, t in slots.items())
            raise self.error(
                f"{path} has {have}, as outputs × inputs, but its weight in this "
                f"{type(self.model).__name__} is {shape.outputs} × {shape.inputs}; the file is for "
                "another base model, or damaged"
            )
        return {slot: slots[slot].contiguous() for slot in (DOWN, UP, MAGNITUDE) if slot in slots}

    def scale(self, path: str, rank: int, in_file: Iterable[float]) -> float:
        """Returns the scale s of the module at `path`.

        `in_file` are the scales that the file may mean. The user's alpha decides between them, and
        is used if there are none.
        """
        possible = sorted(set(in_file))
        if self.alpha is None:
            if len(possible) == 1:
                return possible[0]
            if not possible:
                raise self.error(
                    "the files do not say alpha; give alpha=… as it was in training. The rank of "
                    f"{path} is {rank}, and the change is alpha / rank · B·A"
                )
            either = " or ".join(f"alpha={s * rank:g}, a scale of {s:g}" for s in possible)
            raise self.error(f"its scale can be understood in two ways; give {either}")
        given = self.alpha / rank
        if possible and not any(math.isclose(given, s, rel_tol=1e-6) for s in possible):
            alphas = " or ".join(f"{s * rank:g}" for s in possible)
            raise self.error(
                f"alpha={self.alpha:g} was given, but for {path} of rank {rank} the file says "
                f"{alphas}; leave alpha out"
            )
        return given

    def number(self, holder: Mapping[str, Any], name: str) -> float:
        """Returns a number of the config."""
        return self.field(Finite, holder, name)  # type: ignore[no-any-return]

    def field(self, kind: Any, holder: Mapping[str, Any], name: str) -> Any:
        """Returns a field of the config as the type `kind` (see `schema.checked`)."""
        try:
            return checked(kind, holder[name], name)
        except SchemaError as error:
            raise self.error(f"in its {CONFIG}, {error}") from None

    def tied(self, path: str) -> list[str]:
        """Returns the other modules with the weight of the module at `path`."""
        weight = self.modules[path].weight
        return [
            other
            for other, module in self.modules.items()
            if other != path and getattr(module, "weight", None) is weight
        ]


def _fits(slots: Mapping[str, Tensor], shape: Shape) -> bool:
    """Returns whether the slots are a pair, and perhaps a magnitude, of this shape."""
    A, B, m = slots[DOWN], slots[UP], slots.get(MAGNITUDE)
    if not A.ndim == B.ndim == 2 or not B.shape[1] == len(A) > 0:
        return False
    return (len(B), A.shape[1]) == shape[:2] and (m is None or tuple(m.shape) == shape[:1])
