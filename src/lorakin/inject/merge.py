"""Folding adapters into the weights of one module and taking them out again, bit for bit.

The base's own parameters are set aside, not overwritten, and come back as the same objects. That costs one more copy
of each adapted weight while merged, and it leaves a tied partner of the weight as it was. Experts in one parameter are
written over, and what was there is kept aside. A quantised weight stays where it is and is not used while merged: rounding
the merged weight into so few bits again would lose most of what was learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lorakin.errors import StateError
from lorakin.family import Method, Pair, all_finite
from lorakin.inject import layers
from lorakin.inject.adapted import attach
from lorakin.inject.attachments import BIAS, Attachments, attachments_of, ours
from lorakin.inject.branch import Branch, Copy
from lorakin.inject.experts import set_aside
from lorakin.inject.layers import Layer, QuantisedLayer, UngroupedLayer
from lorakin.inject.rows import TokenRowsBranch, check_size
from lorakin.inject.tokens import fold


class Placed(Protocol):
    """Which modules an adapter adapts, each with its method, and which it trains whole, or the biases of."""

    @property
    def methods(self) -> Mapping[str, Method]: ...

    @property
    def copies(self) -> tuple[str, ...]: ...

    @property
    def biases(self) -> tuple[str, ...]: ...


def check_together(plans: Mapping[str, Placed]) -> None:
    """Whether the adapters of these plans, by name, can be merged at the same time.

    Raises:
        StateError: one trains a module whole in which another changes something.
    """
    for name, placement in plans.items():
        for whole in placement.copies:
            for other, there in plans.items():
                if other != name and whole in there.copies:
                    raise StateError(
                        f"two adapters that train {whole} whole cannot both be merged; unmerge the "
                        f"other first ({name!r} and {other!r})"
                    )
                inside = [
                    p
                    for p in (*there.methods, *there.copies, *there.biases)
                    if p.startswith(f"{whole}.")
                ]
                if other != name and inside:
                    raise StateError(
                        f"{other!r} adapts {inside[0]}, inside {whole}, which {name!r} trains whole; they cannot both be merged"
                    )


def check_for_good(chosen: Mapping[str, Placed], staying: Mapping[str, Placed]) -> None:
    """Whether the adapters `staying` are the same functions once `chosen` are merged for good.

    A change that adds to the weight does so over any weight. A gain is over the weight that there
    is: over another one it is another function, whether the adapter is in use now or later.

    Raises:
        StateError: one of those that stay has a gain over a weight that would change.
    """
    changed = {path: name for name, placement in chosen.items() for path in placement.methods}
    whole = {path: name for name, placement in chosen.items() for path in placement.copies}
    for other, placement in staying.items():
        for path in (path for path, method in placement.methods.items() if method.gains):
            by = changed.get(path) or next(
                (whole[p] for p in whole if path.startswith(f"{p}.")), None
            )
            if by is not None:
                raise StateError(
                    f"adapter {other!r} ({placement.methods[path].words}) has a gain over the weight of "
                    f"{path}, which merging {by!r} for good would change, and with it what {other!r} "
                    f"does. Merge both at once with lorakin.merge(model, {[*chosen, other]}), or "
                    f"remove {other!r} first. Not for good, {by!r} can be merged beside it"
                )


def move_adapters(old: nn.Module, new: nn.Module) -> None:
    """Hang the adapters of a quantised module on the plain one that takes its place."""
    attached = attachments_of(old)
    kind = layers.kind_of(new)
    assert kind is not None
    for name in attached.names():
        child = attached[name]
        if isinstance(child, Branch):
            child.layer = kind
        attach(new, name, child)
    moved = attachments_of(new)
    moved.active, moved.off = attached.active, attached.off


def set_merged(
    module: nn.Module, path: str, names: tuple[str, ...], dtype: torch.dtype = torch.float32
) -> None:
    """Make the module's parameters those of the base with the adapters `names` folded in; () restores the base's own.

    The weight is computed from W0 in float32 (float64 for a float64 base) and rounded once, so that merging several
    adapters one by one gives the bits of merging them at once. That of a quantised module becomes a plain one in `dtype`.

    Raises:
        StateError: a merged weight would not be finite; the module is left as it was.
    """
    attached = attachments_of(module)
    names = tuple(
        name for name in attached.names() if name in names
    )  # in one order, whatever order they were merged in
    if layers.kind_of(module) is QuantisedLayer and any(
        isinstance(child, Branch) for child in attached.values()
    ):
        bias = _own_bias(attached, names, path)
        branches = [attached[name] for name in names if isinstance(attached[name], Branch)]
        dense = _dense(module, path, branches, dtype) if branches else None
        base = (attached.base or _base_bias(module)) if names else {}
        replacement = _with_bias(base, bias, path) if names else attached.base
        attached.dense = dense
    elif names:
        bias = _own_bias(attached, names, path)
        base = attached.base or _own_tensors(module)
        device = next(iter(base.values())).device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            replacement = _folded(module, base, path, [attached[name] for name in names])
            if attached.biased:
                replacement = replacement | _with_bias(base, bias, path)
    else:
        replacement, base = attached.base, {}
    attached.base = base
    for key, tensor in replacement.items():
        owner, _, leaf = key.rpartition(".")
        setattr(module.get_submodule(owner), leaf, tensor)
    attached.merged = names


@torch.no_grad()
def _dense(module: nn.Module, path: str, branches: Sequence[Branch], dtype: torch.dtype) -> Tensor:
    matrix = QuantisedLayer.weight(module).matrix
    return folded(
        matrix, QuantisedLayer, module, [branch.pair(matrix) for branch in branches], path, dtype
    )


def _own_bias(attached: Attachments, names: Sequence[str], path: str) -> Tensor | None:
    """The bias of that of these adapters which has one of its own here; None if none has."""
    own = {name: bias for name in names if (bias := attached.bias_of(name)) is not None}
    if len(own) > 1:
        one, other, *_ = own
        raise StateError(
            f"{one!r} and {other!r} both train the bias of {path}; unmerge one before merging the other"
        )
    return next(iter(own.values()), None)


def _base_bias(module: nn.Module) -> dict[str, Tensor]:
    """The base's bias, if an adapter here has one of its own."""
    bias = module._parameters.get(BIAS)
    return {BIAS: bias} if attachments_of(module).biased and bias is not None else {}


@torch.no_grad()
def _with_bias(base: dict[str, Tensor], bias: Tensor | None, path: str) -> dict[str, Tensor]:
    """The bias of `base`, if it has one there, or in its place this one."""
    own = {BIAS: base[BIAS]} if BIAS in base else {}
    return own if bias is None else {BIAS: _like(base[BIAS], bias, path)}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The base's tensors that merging replaces: weight and bias, or all that a module trained whole saves."""
    attached = attachments_of(module)
    bias = _base_bias(module)
    if any(isinstance(child, Branch | TokenRowsBranch) for child in attached.values()):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return {"weight": set_aside(module, weight)} | bias
    if bias:
        return bias
    saved, skip = module.state_dict(keep_vars=True), ours(module)
    return {key: tensor for key, tensor in saved.items() if not key.startswith(skip)}


def _folded(
    module: nn.Module,
    base: dict[str, Tensor],
    path: str,
    adapters: list[Branch | Copy | TokenRowsBranch],
) -> dict[str, Tensor]:
    branches = [adapter for adapter in adapters if isinstance(adapter, Branch)]
    if rows := [adapter for adapter in adapters if isinstance(adapter, TokenRowsBranch)]:
        table = base["weight"]
        check_size(rows, attachments_of(module), table)
        return {"weight": _like(table, fold(table.detach(), rows), path)}
    if not branches:
        return _copied(base, path, adapters) if any(isinstance(a, Copy) for a in adapters) else base
    if any(branch.layer is UngroupedLayer for branch in branches):
        raise StateError(
            f"{path} is a convolution in groups, and an adapter on it, which PEFT trained, reads the inputs of all groups: "
            "that is no change of its weight, so it cannot be merged"
        )
    weight, layer = base["weight"], branches[0].layer
    matrix = layer.matrix(weight.detach())
    for branch in branches:
        if branch.shape[:2] != matrix.shape:
            raise StateError(
                f"{path} is now {' × '.join(map(str, matrix.shape))}, but its adapter was made for {branch.shape.outputs} × "
                f"{branch.shape.inputs}: something, such as resize_token_embeddings, changed it; do that before adapting"
            )
    return {
        "weight": folded(weight, layer, module, [branch.pair(matrix) for branch in branches], path)
    }


def folded(
    weight: Tensor,
    layer: type[Layer],
    module: nn.Module,
    pairs: Sequence[Pair],
    path: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`weight` with the pairs folded in, computed in float32 (float64 for a float64 weight) and rounded once.

    Args:
        weight: as the module holds it.
        layer: the module's kind.
        module: gives the layout; its own weight is not read.
        pairs: over `weight` as a matrix; several add up.
        path: for the error.
        dtype: of the result, by default the weight's.

    Raises:
        StateError: the result would not be finite.
    """
    changed = wide = layer.matrix(weight.detach()).to(
        torch.promote_types(weight.dtype, torch.float32)
    )
    for pair in pairs:
        one = pair.applied_to(wide)
        changed = one if changed is wide else changed + (one - wide)
    return _like(weight if dtype is None else weight.to(dtype), layer.layout(changed, module), path)


def _copied(
    base: dict[str, Tensor], path: str, adapters: list[Branch | Copy | TokenRowsBranch]
) -> dict[str, Tensor]:
    copies = [adapter for adapter in adapters if isinstance(adapter, Copy)]
    if len(copies) > 1:
        raise StateError(
            f"two adapters that train {path} whole cannot both be merged; unmerge the other first"
        )
    trained = copies[0].module.state_dict(keep_vars=True)
    made: dict[tuple[int, int], Tensor] = {}  # what is tied inside the module stays tied
    for key, tensor in base.items():
        if (id(tensor), id(trained[key])) not in made:
            made[id(tensor), id(trained[key])] = _like(tensor, trained[key].detach(), path)
    return {key: made[id(tensor), id(trained[key])] for key, tensor in base.items()}


def _like(old: Tensor, values: Tensor, path: str) -> Tensor:
    """`values` with the dtype and memory layout of `old`, as a parameter if that is one; refused if not finite."""
    new = torch.empty_like(old).copy_(values)
    if new.is_floating_point() and not all_finite(new):
        raise StateError(
            f"merging would write NaN or infinity into {path}; the weights are left as they were"
        )
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
