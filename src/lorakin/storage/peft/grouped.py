"""Grouped convolutions in PEFT's files: reading and writing.

lorakin's pair changes the weight (outputs, inputs/groups · kernel), with the same `down` for all
groups. PEFT's A is a convolution of all inputs, its B one of kernel 1 in groups:

    lora_A.weight (groups·q, inputs, k…)    rows g·q … g·q + q − 1 are of group g
    lora_B.weight (outputs, q, 1…)          output o is of group o // (outputs/groups)

So PEFT's change is a change of the weight only if the rows of A of each group read no inputs of
other groups. PEFT trains them to read others too, which a grouped convolution cannot do, and so it
cannot merge them. Such an adapter is read as what it is, a pair across groups:
`PeftGroupedConvolution`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError
from lorakin.family.dora import row_norms
from lorakin.inject.layer_kinds import is_grouped
from lorakin.inject.placement import base_weight_of
from lorakin.storage.peft.formats import DOWN, MAGNITUDE, UP
from lorakin.storage.peft.scales import PATTERNS, scale_at


class Grouped(NamedTuple):
    """PEFT's tensors of one module as matrices: A (groups·q, inputs · kernel), B (outputs, q)."""

    A: Tensor
    B: Tensor


def pair_to_peft(module: Any, up: Tensor, down: Tensor) -> Grouped:
    """Returns a pair up (outputs, r), down (r, inputs/groups · kernel) as PEFT's tensors.

    q is the smaller of r and the outputs of a group: no group's change has a higher rank.
    """
    groups, each = module.groups, up.shape[0] // module.groups
    if each < up.shape[1]:
        rows = (up @ down).view(groups, each, -1)
        up = torch.eye(each, dtype=up.dtype, device=up.device).repeat(groups, 1)
    else:
        rows = down.expand(groups, *down.shape)
    A = rows.new_zeros(groups, rows.shape[1], groups, rows.shape[2])
    for group in range(groups):
        A[group, :, group] = rows[group]
    return Grouped(A.flatten(0, 1).flatten(1), up)


def _pair_across_groups_to_peft(module: Any, up: Tensor, down: Tensor) -> Grouped:
    """Returns a pair across groups as PEFT's tensors.

    q is r/groups if `up` is block diagonal. Otherwise it is r, and A is repeated for each group.
    """
    groups = module.groups
    if len(down) % groups == 0:
        blocks = up.view(groups, -1, groups, len(down) // groups)
        B = torch.cat([blocks[group, :, group] for group in range(groups)])
        if torch.equal(_block_diagonal(B, groups), up):
            return Grouped(down, B)
    return Grouped(down.repeat(groups, 1), up)


def pair_from_peft(module: Any, peft: Grouped) -> tuple[Tensor, Tensor] | None:
    """Returns PEFT's tensors as a pair up (outputs, r), down (r, inputs/groups · kernel).

    r is as small as it can be without rounding. None if their change is not one of the weight.
    """
    groups, rank = module.groups, peft.B.shape[1]
    A = peft.A.view(groups, rank, groups, -1)
    # The rows of each group, on the inputs of that group.
    diagonal = torch.stack([A[group, :, group] for group in range(groups)])
    if A.count_nonzero() > diagonal.count_nonzero():
        return None
    if all(torch.equal(diagonal[0], rows) for rows in diagonal):
        return peft.B, diagonal[0]
    inputs = diagonal.shape[2]
    if inputs <= len(peft.A):
        change = (peft.B.view(groups, -1, rank) @ diagonal).flatten(0, 1)
        return change, torch.eye(inputs, dtype=change.dtype, device=change.device)
    return _block_diagonal(peft.B, groups), diagonal.flatten(0, 1)


def with_all_ranks(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the slots with a B of all ranks, (outputs, groups·q), if PEFT's B is in groups."""
    A, B = slots.get(DOWN), slots.get(UP)
    if A is None or B is None or A.dim() != 2 or B.dim() != 2 or not B.shape[1]:
        return dict(slots)
    groups = len(A) // B.shape[1]
    if groups < 2 or len(A) % B.shape[1] or len(B) % groups:
        return dict(slots)
    return {**slots, UP: _block_diagonal(B, groups)}


def _block_diagonal(B: Tensor, groups: int) -> Tensor:
    """Returns B (outputs, q) in groups as (outputs, groups·q), with separate columns by group."""
    blocks = B.view(groups, -1, B.shape[1])
    return torch.block_diag(*blocks)  # type: ignore[no-untyped-call, no-any-return]


def norms_in_peft(module: nn.Module, peft: Grouped, scale: float) -> Tensor:
    """Returns what PEFT uses as the norms of the changed weight's rows.

    They are not these norms: PEFT reshapes B as if it had as many columns as A has rows.
    """
    weight = base_weight_of(module).to(peft.A)
    changed = peft.B.reshape(-1, len(peft.A)) @ peft.A
    lengths: Tensor = torch.linalg.vector_norm(weight + scale * changed.view_as(weight), dim=1)
    return lengths


def to_peft(module: Any, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns PEFT's tensors of one module with a pair of scale 1, and perhaps a magnitude."""
    is_across_groups = slots[DOWN].shape[1] == base_weight_of(module).shape[1] * module.groups
    convert = _pair_across_groups_to_peft if is_across_groups else pair_to_peft
    peft = convert(module, slots[UP], slots[DOWN])
    slots_in_peft = {DOWN: peft.A, UP: peft.B}
    if MAGNITUDE in slots:
        norms = row_norms(base_weight_of(module).to(slots[DOWN]), slots[UP], slots[DOWN])
        gain = torch.where(norms > 0, slots[MAGNITUDE] / norms, 1.0)
        slots_in_peft[MAGNITUDE] = gain * norms_in_peft(module, peft, 1.0)
    return slots_in_peft


def from_peft(
    modules: Mapping[str, nn.Module],
    slots: Mapping[str, dict[str, Tensor]],
    config: Mapping[str, Any],
    where: str,
) -> tuple[Mapping[str, Any], dict[str, dict[str, Tensor]], frozenset[str]]:
    """Returns the config and the slots with lorakin's pairs, and the paths of pairs across groups.

    Raises:
        AdapterError: shapes do not fit; there is a magnitude on a pair across groups.
    """
    across_groups = set[str]()
    converted, ranks, alphas = dict(slots), dict[str, Any](), dict[str, Any]()
    for path, of_module in slots.items():
        module: Any = modules[path]
        if not is_grouped(module) or not {DOWN, UP} <= of_module.keys():
            continue
        scale = scale_at(config, path)
        peft = _checked(module, of_module, scale.rank, f"{where}: {path}")
        pair = pair_from_peft(module, peft)
        if pair is None:
            if MAGNITUDE in of_module:
                raise AdapterError(
                    f"{where}: the pair of {path}, a convolution with groups={module.groups}, "
                    "reads inputs across groups, as PEFT trains it. DoRA's magnitudes need a "
                    "change of the layer's weight, which this is not; leave the layer out when "
                    "training"
                )
            across_groups.add(path)
            pair = _block_diagonal(peft.B, module.groups), peft.A
        converted[path] = _in_file_shapes(module, of_module, peft, scale.value, pair)
        key, rank = f"^{re.escape(path)}", len(pair[1])
        ranks[key], alphas[key] = rank, rank ** (0.5 if scale.rslora else 1)
    if not ranks:
        return config, converted, frozenset()
    changed = {}
    for (field, _), values in zip(PATTERNS, (ranks, alphas), strict=True):
        patterns = (config.get(field) or {}).items()
        changed[field] = values | {key: value for key, value in patterns if key not in values}
    return {**config, **changed}, converted, frozenset(across_groups)


def _checked(module: Any, slots: Mapping[str, Tensor], rank: int, what: str) -> Grouped:
    """Returns PEFT's tensors of one module, in float32 at least, if their shapes fit."""
    peft = Grouped(slots[DOWN].flatten(1), slots[UP].flatten(1))
    inputs = module.in_channels * math.prod(module.kernel_size)
    wanted = (rank, inputs), (module.out_channels, rank // module.groups)
    if rank % module.groups or (tuple(peft.A.shape), tuple(peft.B.shape)) != wanted:
        have = f"A {tuple(slots[DOWN].shape)}, B {tuple(slots[UP].shape)}"
        raise AdapterError(
            f"{what} has {have}, which do not fit rank {rank} on a convolution with "
            f"groups={module.groups}"
        )
    return Grouped(*(tensor.float() if tensor.element_size() < 4 else tensor for tensor in peft))


def _in_file_shapes(
    module: Any,
    slots: Mapping[str, Tensor],
    peft: Grouped,
    scale: float,
    pair: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """Returns the slots with this pair times `scale`, in the shapes of a file."""
    shaped = dict(slots)
    up, down = pair[0] * scale, pair[1]
    if MAGNITUDE in slots:
        gain = slots[MAGNITUDE].flatten().to(peft.A) / norms_in_peft(module, peft, scale)
        lengths = row_norms(base_weight_of(module).to(up), up, down)
        shaped[MAGNITUDE] = (gain * lengths).view(slots[MAGNITUDE].shape)
    shaped[DOWN] = down.view(len(down), -1, *module.kernel_size)
    shaped[UP] = up.view(*up.shape, *(1 for _ in module.kernel_size))
    return shaped
