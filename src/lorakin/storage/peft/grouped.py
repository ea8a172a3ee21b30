"""PEFT's form for grouped convolutions, both ways.

lorakin's pair is over the weight (outputs, inputs/groups · kernel), the same `down` for all
groups. PEFT's A is a convolution of all inputs, its B one of kernel 1 in groups:

    lora_A.weight (groups·q, inputs, k…)    rows g·q … g·q + q − 1 are of group g
    lora_B.weight (outputs, q, 1…)          output o is of group o // (outputs/groups)

So PEFT computes a change of the weight only where the rows of a group read its own inputs alone.
It trains them to read others too, which no grouped convolution does, and cannot merge that itself.
Such an adapter is read as what it is, a pair over all inputs: `PeftGroupedConvolution`.
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
from lorakin.storage.peft.scales import PATTERNS, scale_at


class Grouped(NamedTuple):
    """PEFT's tensors of one module as matrices: A (groups·q, inputs · kernel), B (outputs, q)."""

    A: Tensor
    B: Tensor


def as_peft(module: Any, up: Tensor, down: Tensor) -> Grouped:
    """The pair up (outputs, r), down (r, inputs/groups · kernel) in PEFT's form.

    q is r, or the outputs of a group where those are fewer: no group's change has a higher rank.
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


def _gathered(module: Any, up: Tensor, down: Tensor) -> Grouped:
    """A pair over all inputs in PEFT's form.

    q is r/groups if `up` is in groups itself. Otherwise it is r, and A stands there for each group.
    """
    groups = module.groups
    if len(down) % groups == 0:
        blocks = up.view(groups, -1, groups, len(down) // groups)
        B = torch.cat([blocks[group, :, group] for group in range(groups)])
        if torch.equal(_spread(B, groups), up):
            return Grouped(down, B)
    return Grouped(down.repeat(groups, 1), up)


def as_pair(module: Any, theirs: Grouped) -> tuple[Tensor, Tensor] | None:
    """PEFT's tensors as a pair up (outputs, r), down (r, inputs/groups · kernel).

    r is as small as it can be without rounding. None if what they add is no change of the weight.
    """
    groups, rank = module.groups, theirs.B.shape[1]
    A = theirs.A.view(groups, rank, groups, -1)
    own = torch.stack([A[group, :, group] for group in range(groups)])
    if A.count_nonzero() > own.count_nonzero():
        return None
    if all(torch.equal(own[0], one) for one in own):
        return theirs.B, own[0]
    inputs = own.shape[2]
    if inputs <= len(theirs.A):
        whole = (theirs.B.view(groups, -1, rank) @ own).flatten(0, 1)
        return whole, torch.eye(inputs, dtype=whole.dtype, device=whole.device)
    return _spread(theirs.B, groups), own.flatten(0, 1)


def spread(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The slots with a B of all ranks, (outputs, groups·q), where PEFT's B is in groups."""
    A, B = slots.get("A"), slots.get("B")
    if A is None or B is None or A.dim() != 2 or B.dim() != 2 or not B.shape[1]:
        return dict(slots)
    groups = len(A) // B.shape[1]
    if groups < 2 or len(A) % B.shape[1] or len(B) % groups:
        return dict(slots)
    return {**slots, "B": _spread(B, groups)}


def _spread(B: Tensor, groups: int) -> Tensor:
    """B (outputs, q) in groups as (outputs, groups·q), with columns of its own for each group."""
    blocks = B.view(groups, -1, B.shape[1])
    return torch.block_diag(*blocks)  # type: ignore[no-untyped-call, no-any-return]


def their_lengths(module: nn.Module, theirs: Grouped, scale: float) -> Tensor:
    """What PEFT takes for the norms of the changed weight's rows.

    It multiplies B as if it had as many columns as A has rows, so they are norms of something else.
    """
    weight = base_weight_of(module).to(theirs.A)
    changed = theirs.B.reshape(-1, len(theirs.A)) @ theirs.A
    lengths: Tensor = torch.linalg.vector_norm(weight + scale * changed.view_as(weight), dim=1)
    return lengths


def written(module: Any, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For PEFT the tensors of one module: `A`, `B` whose scale is 1, and perhaps `m`."""
    over_all = slots["A"].shape[1] == base_weight_of(module).shape[1] * module.groups
    theirs = (
        _gathered(module, slots["B"], slots["A"])
        if over_all
        else as_peft(module, slots["B"], slots["A"])
    )
    there = {"A": theirs.A, "B": theirs.B}
    if "m" in slots:
        ours = row_norms(base_weight_of(module).to(slots["A"]), slots["B"], slots["A"])
        gain = torch.where(ours > 0, slots["m"] / ours, 1.0)
        there["m"] = gain * their_lengths(module, theirs, 1.0)
    return there


def read(
    modules: Mapping[str, nn.Module],
    slots: Mapping[str, dict[str, Tensor]],
    config: Mapping[str, Any],
    where: str,
) -> tuple[Mapping[str, Any], dict[str, dict[str, Tensor]], frozenset[str]]:
    """The config and the slots with lorakin's pairs for PEFT's, and the paths over all inputs.

    Raises:
        AdapterError: shapes do not fit; there is a magnitude over what is no change of the weight.
    """
    over_all = set[str]()
    done, ranks, alphas = dict(slots), dict[str, Any](), dict[str, Any]()
    for path, own in slots.items():
        module: Any = modules[path]
        if not is_grouped(module) or not {"A", "B"} <= own.keys():
            continue
        scale = scale_at(config, path)
        theirs = _checked(module, own, scale.rank, f"{where}: {path}")
        pair = as_pair(module, theirs)
        if pair is None:
            if "m" in own:
                raise AdapterError(
                    f"{where}: what it adds to {path}, a convolution with groups={module.groups}, "
                    "reads inputs across groups, as PEFT trains it. DoRA's magnitudes need a "
                    "change of the layer's weight, which that is not; leave the layer out when "
                    "training"
                )
            over_all.add(path)
            pair = _spread(theirs.B, module.groups), theirs.A
        done[path] = _ours(module, own, theirs, scale.value, pair)
        key, rank = f"^{re.escape(path)}", len(pair[1])
        ranks[key], alphas[key] = rank, rank ** (0.5 if scale.rslora else 1)
    if not ranks:
        return config, done, frozenset()
    changed = {}
    for (field, _), values in zip(PATTERNS, (ranks, alphas), strict=True):
        said = (config.get(field) or {}).items()
        changed[field] = values | {key: value for key, value in said if key not in values}
    return {**config, **changed}, done, frozenset(over_all)


def _checked(module: Any, slots: Mapping[str, Tensor], rank: int, what: str) -> Grouped:
    """PEFT's tensors of one module, in float32 at least, if their shapes fit."""
    theirs = Grouped(slots["A"].flatten(1), slots["B"].flatten(1))
    inputs = module.in_channels * math.prod(module.kernel_size)
    wanted = (rank, inputs), (module.out_channels, rank // module.groups)
    if rank % module.groups or (tuple(theirs.A.shape), tuple(theirs.B.shape)) != wanted:
        have = f"A {tuple(slots['A'].shape)}, B {tuple(slots['B'].shape)}"
        raise AdapterError(
            f"{what} has {have}, which do not fit rank {rank} on a convolution with "
            f"groups={module.groups}"
        )
    return Grouped(*(tensor.float() if tensor.element_size() < 4 else tensor for tensor in theirs))


def _ours(
    module: Any,
    slots: Mapping[str, Tensor],
    theirs: Grouped,
    scale: float,
    pair: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """The slots with this pair, whose scale becomes 1, in the shapes of a file."""
    out = dict(slots)
    up, down = pair[0] * scale, pair[1]
    if "m" in slots:
        gain = slots["m"].flatten().to(theirs.A) / their_lengths(module, theirs, scale)
        lengths = row_norms(base_weight_of(module).to(up), up, down)
        out["m"] = (gain * lengths).view(slots["m"].shape)
    out["A"] = down.view(len(down), -1, *module.kernel_size)
    out["B"] = up.view(*up.shape, *(1 for _ in module.kernel_size))
    return out
