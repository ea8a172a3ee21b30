"""Folding adapters into the weights of one module, and taking them out again to the bit.

The base's own parameters are set aside, not overwritten, and come back as the same objects. This
costs one more copy of each adapted weight while merged, and a tied partner of the weight stays as
it was. Experts held in one parameter are overwritten, and a copy of what was there is kept. A
quantised weight stays where it is and is unused while merged: rounding the merged weight back to
so few bits would lose most of what was learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakin.errors import StateError
from lorakin.family import Pair, all_finite
from lorakin.family.precision import wide_dtype
from lorakin.inject import layer_kinds
from lorakin.inject.adapted import attach
from lorakin.inject.attachments import BIAS, Attachments, adapter_prefixes, attachments_of
from lorakin.inject.branch import Branch, Copy
from lorakin.inject.experts import kept_weight
from lorakin.inject.layer_kinds import LayerKind, PeftGroupedConvolution, QuantisedLayer
from lorakin.inject.token_rows import TokenRowsBranch, check_size
from lorakin.inject.trainable_tokens import table_with_rows

if TYPE_CHECKING:
    from lorakin.inject.placement import Placement


def check_together(placements: Mapping[str, Placement]) -> None:
    """Checks that the adapters with these placements, by name, can be merged at the same time.

    Raises:
        StateError: one trains a module whole in which another changes something.
    """
    for name, placement in placements.items():
        for whole in placement.whole_modules:
            for other, other_placement in placements.items():
                if other != name and whole in other_placement.whole_modules:
                    raise StateError(
                        f"{name!r} and {other!r} both train {whole} whole, so they cannot both be "
                        "merged; unmerge one first"
                    )
                touched = (
                    *other_placement.methods,
                    *other_placement.whole_modules,
                    *other_placement.biases,
                )
                inside = [path for path in touched if path.startswith(f"{whole}.")]
                if other != name and inside:
                    raise StateError(
                        f"{other!r} adapts {inside[0]}, inside {whole}, which {name!r} trains "
                        "whole; they cannot both be merged"
                    )


def check_for_good(chosen: Mapping[str, Placement], staying: Mapping[str, Placement]) -> None:
    """Checks that the adapters `staying` compute the same once `chosen` are merged permanently.

    A change that adds to the weight does so over any weight. A gain multiplies the weight that is
    there: over another weight it is another function, whether the adapter is in use now or later.

    Raises:
        StateError: an adapter that stays has a gain over a weight that would change.
    """
    changed = {path: name for name, placement in chosen.items() for path in placement.methods}
    whole = {path: name for name, placement in chosen.items() for path in placement.whole_modules}
    for other, placement in staying.items():
        for path in (path for path, method in placement.methods.items() if method.has_gain):
            by = changed.get(path) or next(
                (whole[p] for p in whole if path.startswith(f"{p}.")), None
            )
            if by is not None:
                raise StateError(
                    f"adapter {other!r} ({placement.methods[path].words}) has a gain over the "
                    f"weight of {path}; merging {by!r} for good would change that weight, and with "
                    f"it what {other!r} does. Merge both at once with lorakin.merge(model, "
                    f"{[*chosen, other]}), or remove {other!r} first, or merge {by!r} without "
                    "permanent=True"
                )


def move_adapters(old: nn.Module, new: nn.Module) -> None:
    """Move the adapters of a quantised module to the plain one that takes its place."""
    attached = attachments_of(old)
    kind = layer_kinds.kind_of(new)
    assert kind is not None
    for name in attached.names():
        child = attached[name]
        if isinstance(child, Branch):
            child.kind = kind
        attach(new, name, child)
    moved = attachments_of(new)
    moved.active, moved.off = attached.active, attached.off


def set_merged(
    module: nn.Module, path: str, names: tuple[str, ...], dtype: torch.dtype = torch.float32
) -> None:
    """Give the module the base's parameters with the adapters `names` folded in; () undoes it.

    The weight is computed from W0 in float32 (float64 for a float64 base) and rounded once. So
    merging adapters one by one gives the same bits as merging them at once. A quantised module's
    merged weight is a plain one in `dtype`.

    Raises:
        StateError: a merged weight would not be finite; the module stays as it was.
    """
    attached = attachments_of(module)
    # In one order, whatever order they were merged in.
    names = tuple(name for name in attached.names() if name in names)
    is_quantised = layer_kinds.kind_of(module) is QuantisedLayer and any(
        isinstance(child, Branch) for child in attached.values()
    )

    base: dict[str, Tensor] = {}
    if is_quantised:
        bias = _own_bias(attached, names, path)
        branches = [attached[name] for name in names if isinstance(attached[name], Branch)]
        dense = _dense(module, path, branches, dtype) if branches else None
        if names:
            base = attached.base_before_merge or _base_bias(module)
        replacement = _with_bias(base, bias, path) if names else attached.base_before_merge
        attached.merged_weight = dense
    elif names:
        bias = _own_bias(attached, names, path)
        base = attached.base_before_merge or _own_tensors(module)
        device = next(iter(base.values())).device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            replacement = _folded(module, base, path, [attached[name] for name in names])
            if attached.has_bias:
                replacement = replacement | _with_bias(base, bias, path)
    else:
        replacement = attached.base_before_merge

    attached.base_before_merge = base
    for key, tensor in replacement.items():
        owner, _, leaf = key.rpartition(".")
        setattr(module.get_submodule(owner), leaf, tensor)
    attached.merged = names


@torch.no_grad()
def _dense(module: nn.Module, path: str, branches: Sequence[Branch], dtype: torch.dtype) -> Tensor:
    """The weight of a quantised module with these branches folded in, as a plain one."""
    matrix = QuantisedLayer.weight(module).matrix
    return folded(
        matrix, QuantisedLayer, module, [branch.pair(matrix) for branch in branches], path, dtype
    )


def _own_bias(attached: Attachments, names: Sequence[str], path: str) -> Tensor | None:
    """The bias of the one adapter among `names` that has its own here; None if none has."""
    own = {name: bias for name in names if (bias := attached.bias_of(name)) is not None}
    if len(own) > 1:
        one, other, *_ = own
        raise StateError(
            f"{one!r} and {other!r} both train the bias of {path}; unmerge one before you merge "
            "the other"
        )
    return next(iter(own.values()), None)


def _base_bias(module: nn.Module) -> dict[str, Tensor]:
    """The base's bias, if an adapter here has its own."""
    bias = module._parameters.get(BIAS)
    return {BIAS: bias} if attachments_of(module).has_bias and bias is not None else {}


@torch.no_grad()
def _with_bias(base: dict[str, Tensor], bias: Tensor | None, path: str) -> dict[str, Tensor]:
    """The bias to set, if the base has one: `bias`, or else the base's own."""
    own = {BIAS: base[BIAS]} if BIAS in base else {}
    return own if bias is None else {BIAS: _like(base[BIAS], bias, path)}


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The base's tensors that merging replaces: weight and bias, or a whole module's state."""
    attached = attachments_of(module)
    bias = _base_bias(module)
    if any(isinstance(child, Branch | TokenRowsBranch) for child in attached.values()):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return {"weight": kept_weight(module, weight)} | bias
    if bias:
        return bias
    saved, skip = module.state_dict(keep_vars=True), adapter_prefixes(module)
    return {key: tensor for key, tensor in saved.items() if not key.startswith(skip)}


def _folded(
    module: nn.Module,
    base: dict[str, Tensor],
    path: str,
    adapters: list[Branch | Copy | TokenRowsBranch],
) -> dict[str, Tensor]:
    """What takes the place of the base's tensors while these adapters are merged."""
    branches = [adapter for adapter in adapters if isinstance(adapter, Branch)]
    if rows := [adapter for adapter in adapters if isinstance(adapter, TokenRowsBranch)]:
        table = base["weight"]
        check_size(rows, attachments_of(module), table)
        return {"weight": _like(table, table_with_rows(table.detach(), rows), path)}
    if not branches:
        return _copied(base, path, adapters) if any(isinstance(a, Copy) for a in adapters) else base
    if any(branch.kind is PeftGroupedConvolution for branch in branches):
        raise StateError(
            f"{path} is a convolution in groups, and its adapter, which PEFT trained, reads "
            "the inputs of all groups: that is no change of the weight, so it cannot be merged"
        )
    weight, layer = base["weight"], branches[0].kind
    matrix = layer.matrix(weight.detach())
    for branch in branches:
        if branch.shape[:2] != matrix.shape:
            raise StateError(
                f"{path} is now {' × '.join(map(str, matrix.shape))}, but its adapter was made for "
                f"{branch.shape.outputs} × {branch.shape.inputs}: something, such as "
                "resize_token_embeddings, changed it; do that before adapting"
            )
    return {
        "weight": folded(weight, layer, module, [branch.pair(matrix) for branch in branches], path)
    }


def folded(
    weight: Tensor,
    layer: type[LayerKind],
    module: nn.Module,
    pairs: Sequence[Pair],
    path: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`weight` with the pairs folded in, computed in float32 or float64 and rounded once.

    Args:
        weight: in the module's layout.
        layer: the module's kind.
        module: gives the layout; its own weight is not read.
        pairs: over `weight` as a matrix; several add up.
        path: for the error message.
        dtype: of the result, by default the weight's.

    Raises:
        StateError: the result would not be finite.
    """
    changed = wide = layer.matrix(weight.detach()).to(wide_dtype(weight.dtype))
    for pair in pairs:
        one = pair.applied_to(wide)
        changed = one if changed is wide else changed + (one - wide)
    return _like(weight if dtype is None else weight.to(dtype), layer.layout(changed, module), path)


def _copied(
    base: dict[str, Tensor], path: str, adapters: list[Branch | Copy | TokenRowsBranch]
) -> dict[str, Tensor]:
    """The tensors of the copy that an adapter trained in place of the module."""
    copies = [adapter for adapter in adapters if isinstance(adapter, Copy)]
    if len(copies) > 1:
        raise StateError(
            f"two adapters train {path} whole, so they cannot both be merged; unmerge one first"
        )
    trained = copies[0].module.state_dict(keep_vars=True)
    made: dict[tuple[int, int], Tensor] = {}  # what is tied inside the module stays tied
    for key, tensor in base.items():
        if (id(tensor), id(trained[key])) not in made:
            made[id(tensor), id(trained[key])] = _like(tensor, trained[key].detach(), path)
    return {key: made[id(tensor), id(trained[key])] for key, tensor in base.items()}


def _like(old: Tensor, values: Tensor, path: str) -> Tensor:
    """`values` with the dtype, memory layout and class (tensor or parameter) of `old`.

    Raises:
        StateError: they would not be finite.
    """
    new = torch.empty_like(old).copy_(values)
    if new.is_floating_point() and not all_finite(new):
        raise StateError(
            f"merging would write NaN or infinity into {path}; the weights stay as they were"
        )
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
