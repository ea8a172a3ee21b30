"""VeRA's projections: the pair that all modules share, which is stored once or drawn again.

PEFT draws it from the config's seed, and `save_projection` says whether the file holds it.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lorakin.errors import AdapterError, LorakinWarning
from lorakin.family import Method, Shape, UnadaptedModule
from lorakin.storage.document import Document
from lorakin.storage.peft.formats import PeftFormat

MOST_DRAWN = 1 << 28
"""The most parameters of a pair that is drawn again (one GiB), unless the base itself has more."""


def shared_by_all(document: Document, peft_format: PeftFormat) -> dict[str, Tensor]:
    """Returns the tensors that all modules of an adapter of this form share, by slot."""
    if not document.slots:
        return {}
    slots = next(iter(document.slots.values()))
    return {slot: slots[slot] for slot in peft_format.shared}


def checksum(shared: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of the shared tensors' float32 values."""
    plain = {slot: t.detach().cpu().to(torch.float32).contiguous() for slot, t in shared.items()}
    return hashlib.sha256(safetensors.torch.save(plain)).hexdigest()


def read(
    peft_format: PeftFormat,
    config: Mapping[str, Any],
    remembered: str | None,
    method: Method,
    targets: Mapping[str, UnadaptedModule],
    tensors: Mapping[str, Tensor],
    where: str,
) -> dict[str, Tensor]:
    """Returns the pair that all modules share, by slot: the one in the file, or one drawn again.

    Args:
        peft_format: the form of the file.
        config: PEFT's config.
        remembered: the checksum in lorakin.json, if there is one.
        method: the method, which knows the rank and the seed.
        targets: the adapted modules by path; the widest ones give the pair its shape.
        tensors: the file's tensors by key.
        where: the file, for messages.

    Raises:
        AdapterError: the file lacks it, it does not fit the base, or it is another pair than the
            adapter was trained with.
    """
    if not peft_format.shared or not targets:
        return {}
    found = {slot: tensors[key] for slot, key in peft_format.shared.items() if key in tensors}
    found = found if len(found) == len(peft_format.shared) else {}
    is_saved = config.get("save_projection", peft_format.defaults["save_projection"])
    if found:
        _check_shapes(peft_format, method, targets, found, where)
        if remembered is not None and remembered != checksum(found):
            raise AdapterError(
                f"{where}: its shared pair is not the one that it was trained with: lorakin.json "
                "has another checksum"
            )
    elif is_saved:
        raise AdapterError(
            f"{where}: it lacks {' and '.join(peft_format.shared.values())}, which the config says "
            "it holds"
        )
    if is_saved:
        return found
    drawn = _drawn(peft_format, method, targets, where)
    if not found:
        _check_drawn(drawn, remembered, method, targets, where)
        return drawn
    if not all(torch.equal(drawn[slot], found[slot].float()) for slot in drawn):
        warnings.warn(
            f"{where}: the projections in the file are not those of its seed "
            f"{method.setting('seed')}; the file's are used",
            LorakinWarning,
            stacklevel=2,
        )
    return found


def _largest_sides(targets: Mapping[str, UnadaptedModule]) -> tuple[int, int]:
    """Returns the largest number of inputs and of outputs of the modules."""
    shapes = [target.shape for target in targets.values()]
    return max(shape.inputs for shape in shapes), max(shape.outputs for shape in shapes)


def _check_shapes(
    peft_format: PeftFormat,
    method: Method,
    targets: Mapping[str, UnadaptedModule],
    shared: Mapping[str, Tensor],
    where: str,
) -> None:
    rank, (inputs, outputs) = method.setting("rank"), _largest_sides(targets)
    for slot, tensor in shared.items():
        expected = peft_format.pair_slots[slot].sizes(rank, Shape(outputs, inputs))
        have = tuple(tensor.shape)
        is_wide = len(have) == 2 and all(h >= w for h, w in zip(have, expected, strict=True))
        if not is_wide or rank not in have:
            raise AdapterError(
                f"{where}: {peft_format.shared[slot]} has shape {have}, expected {expected} for "
                f"rank {rank} on this base"
            )


def _drawn(
    peft_format: PeftFormat, method: Method, targets: Mapping[str, UnadaptedModule], where: str
) -> dict[str, Tensor]:
    """Returns the pair drawn again from its seed."""
    rank, (inputs, outputs) = method.setting("rank"), _largest_sides(targets)
    size = rank * (inputs + outputs)
    adapted = sum(math.prod(target.shape[:2]) for target in targets.values())
    if size > max(MOST_DRAWN, adapted):
        raise AdapterError(
            f"{where}: its shared pair of rank {rank:,} is not in the file. Drawn again, it would "
            f"have {size:,} parameters, and the weights that it adapts have {adapted:,}; the file "
            "is damaged or hostile"
        )
    pair = method.parametrisation
    initial = pair.start_all(targets, dict.fromkeys(targets, pair), None, torch.device("cpu"))
    slots = next(iter(initial.values()))
    return {slot: slots[slot] for slot in peft_format.shared}


def _check_drawn(
    drawn: Mapping[str, Tensor],
    remembered: str | None,
    method: Method,
    targets: Mapping[str, UnadaptedModule],
    where: str,
) -> None:
    if remembered is not None and remembered != checksum(drawn):
        base = next(iter(targets.values())).weight
        raise AdapterError(
            f"{where}: the projections drawn again from seed {method.setting('seed')} are not "
            f"those that the adapter was trained with; the base's dtype ({base.dtype}) or the "
            "adapted modules must be others. Load the base in the dtype of training"
        )
