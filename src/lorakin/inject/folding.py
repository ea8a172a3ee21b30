"""Folding adapters into the weights of one module, and taking them out again to the bit.

The base's own parameters are set aside, not overwritten, and come back as the same objects. This
costs one more copy of each adapted weight while merged, and a tied partner of the weight stays as
it was. Experts held in one parameter are overwritten, and a copy of what was there is kept. A
quantised weight stays where it is and is unused while merged: rounding the merged weight back to
so few bits would lose most of what was learned.
"""

from __future__ import annotations

import itertools
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
from lorakin.inject.patterns import is_inside
from lorakin.inject.token_rows import TokenRowsBranch, check_size
from lorakin.inject.trainable_tokens import table_with_rows

if TYPE_CHECKING:
    from lorakin.inject.placement import Placement


def check_together(placements: Mapping[str, Placement]) -> None:
    """Checks that the adapters with these placements, by name, can be merged at the same time.

    Raises:
        StateError: one trains a module whole in which another changes something.
    """
    for name, other in itertools.permutations(placements, 2):
        other_placement = placements[other]
        changed = (
            *other_placement.methods,
            *other_placement.whole_modules,
            *other_placement.biases,
        )
        for whole in placements[name].whole_modules:
            if whole in other_placement.whole_modules:
                raise StateError(
                    f"{name!r} and {other!r} both train {whole} whole, so they cannot both be "
                    "merged; unmerge one first"
                )
            if inside := [path for path in changed if path.startswith(f"{whole}.")]:
                raise StateError(
                    f"{other!r} adapts {inside[0]}, inside {whole}, which {name!r} trains whole; "
                    "they cannot both be merged"
                )


def check_for_good(chosen: Mapping[str, Placement], staying: Mapping[str, Placement]) -> None:
    """Checks that the adapters `staying` compute the same once `chosen` are merged permanently.

    A change that adds to the weight does so over any weight. A gain multiplies the weight that is
    there: over another weight it is another function, whether the adapter is in use now or later.

    Raises:
        StateError: an adapter that stays has a gain over a weight that would change.
    """
    for name, placement in staying.items():
        for path, method in placement.methods.items():
            if not method.has_gain:
                continue
            for merged, merged_placement in chosen.items():
                if path in merged_placement.methods or is_inside(
                    path, merged_placement.whole_modules
                ):
                    raise StateError(
                        f"adapter {name!r} ({method.words}) has a gain over the weight of {path}; "
                        f"merging {merged!r} for good would change that weight, and with it what "
                        f"{name!r} does. Merge both at once with lorakin.merge(model, "
                        f"{[*chosen, name]}), or remove {name!r} first, or merge {merged!r} "
                        "without permanent=True"
                    )


def move_adapters(quantised: nn.Module, plain: nn.Module) -> None:
    """Moves the adapters of a quantised module to the plain one that takes its place."""
    attached = attachments_of(quantised)
    kind = layer_kinds.kind_of(plain)
    assert kind is not None
    for name in attached.names():
        child = attached[name]
        if isinstance(child, Branch):
            child.kind = kind
        attach(plain, name, child)
    moved = attachments_of(plain)
    moved.active, moved.off = attached.active, attached.off


def set_merged(
    module: nn.Module, path: str, names: tuple[str, ...], dtype: torch.dtype = torch.float32
) -> None:
    """Gives the module the base's parameters with the adapters `names` folded in; () undoes it.

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
        bias = _adapter_bias(attached, names, path)
        branches = [attached[name] for name in names if isinstance(attached[name], Branch)]
        merged_weight = _merged_quantised(module, path, branches, dtype) if branches else None
        if names:
            base = attached.base_before_merge or _base_bias(module)
        replacement = _with_bias(base, bias, path) if names else attached.base_before_merge
        attached.merged_weight = merged_weight
    elif names:
        bias = _adapter_bias(attached, names, path)
        base = attached.base_before_merge or _tensors_to_replace(module)
        device = next(iter(base.values())).device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            replacement = _replacements(module, base, path, [attached[name] for name in names])
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
def _merged_quantised(
    module: nn.Module, path: str, branches: Sequence[Branch], dtype: torch.dtype
) -> Tensor:
    """Returns the weight of a quantised module with these branches folded in, as a plain one."""
    matrix = QuantisedLayer.weight(module).matrix
    pairs = [branch.pair(matrix) for branch in branches]
    return weight_with_pairs(matrix, QuantisedLayer, module, pairs, path, dtype)


def _adapter_bias(attached: Attachments, names: Sequence[str], path: str) -> Tensor | None:
    """Returns the bias of the adapter among `names` that trains it; None if none does."""
    biases = {name: bias for name in names if (bias := attached.bias_of(name)) is not None}
    if len(biases) > 1:
        first, second, *_ = biases
        raise StateError(
            f"{first!r} and {second!r} both train the bias of {path}; unmerge one before you merge "
            "the other"
        )
    return next(iter(biases.values()), None)


def _base_bias(module: nn.Module) -> dict[str, Tensor]:
    """Returns the base's bias, if an adapter trains a bias here."""
    bias = module._parameters.get(BIAS)
    return {BIAS: bias} if attachments_of(module).has_bias and bias is not None else {}


@torch.no_grad()
def _with_bias(base: dict[str, Tensor], bias: Tensor | None, path: str) -> dict[str, Tensor]:
    """Returns the bias to set, if the base has one: `bias`, or the base's if that is None."""
    if bias is not None:
        return {BIAS: _like(base[BIAS], bias, path)}
    return {BIAS: base[BIAS]} if BIAS in base else {}


def _tensors_to_replace(module: nn.Module) -> dict[str, Tensor]:
    """Returns the base's tensors to replace: weight and bias, or a whole module's state."""
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


def _replacements(
    module: nn.Module,
    base: dict[str, Tensor],
    path: str,
    adapters: list[Branch | Copy | TokenRowsBranch],
) -> dict[str, Tensor]:
    """Returns what takes the place of the base's tensors while these adapters are merged."""
    branches = [adapter for adapter in adapters if isinstance(adapter, Branch)]
    if rows := [adapter for adapter in adapters if isinstance(adapter, TokenRowsBranch)]:
        table = base["weight"]
        check_size(rows, attachments_of(module), table)
        return {"weight": _like(table, table_with_rows(table.detach(), rows), path)}
    if not branches:
        has_copy = any(isinstance(adapter, Copy) for adapter in adapters)
        return _trained_state(base, path, adapters) if has_copy else base
    if any(branch.kind is PeftGroupedConvolution for branch in branches):
        raise StateError(
            f"{path} is a convolution in groups, and its adapter, which PEFT trained, reads "
            "the inputs of all groups: that is not a change of the weight, so it cannot be merged"
        )
    weight, kind = base["weight"], branches[0].kind
    matrix = kind.matrix(weight.detach())
    for branch in branches:
        if branch.shape[:2] != matrix.shape:
            raise StateError(
                f"{path} is now {' × '.join(map(str, matrix.shape))}, but its adapter was made for "
                f"{branch.shape.outputs} × {branch.shape.inputs}: something, such as "
                "resize_token_embeddings, changed it; do that before adapting"
            )
    pairs = [branch.pair(matrix) for branch in branches]
    return {"weight": weight_with_pairs(weight, kind, module, pairs, path)}


def weight_with_pairs(
    weight: Tensor,
    kind: type[LayerKind],
    module: nn.Module,
    pairs: Sequence[Pair],
    path: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Returns `weight` with the pairs folded in, computed in float32 or float64 and rounded once.

    Args:
        weight: in the module's layout.
        kind: the module's kind.
        module: gives the layout; its own weight is not read.
        pairs: over `weight` as a matrix; several add up.
        path: for the error message.
        dtype: of the result, by default the weight's.

    Raises:
        StateError: the result would not be finite.
    """
    wide = kind.matrix(weight.detach()).to(wide_dtype(weight.dtype))
    merged = wide
    for pair in pairs:
        with_pair = pair.applied_to(wide)
        # One pair alone is not computed as a difference, which would round once more.
        merged = with_pair if merged is wide else merged + (with_pair - wide)
    like = weight if dtype is None else weight.to(dtype)
    return _like(like, kind.layout(merged, module), path)


def _trained_state(
    base: dict[str, Tensor], path: str, adapters: list[Branch | Copy | TokenRowsBranch]
) -> dict[str, Tensor]:
    """Returns the tensors of the copy that an adapter trained in place of the module."""
    copies = [adapter for adapter in adapters if isinstance(adapter, Copy)]
    if len(copies) > 1:
        raise StateError(
            f"two adapters train {path} whole, so they cannot both be merged; unmerge one first"
        )
    trained = copies[0].module.state_dict(keep_vars=True)
    state: dict[str, Tensor] = {}
    # What is tied inside the module stays tied.
    replacements: dict[tuple[int, int], Tensor] = {}
    for key, tensor in base.items():
        both = id(tensor), id(trained[key])
        if both not in replacements:
            replacements[both] = _like(tensor, trained[key].detach(), path)
        state[key] = replacements[both]
    return state


def _like(original: Tensor, values: Tensor, path: str) -> Tensor:
    """Returns `values` with the dtype, memory layout and class (tensor, parameter) of `original`.

    Raises:
        StateError: they would not be finite.
    """
    tensor = torch.empty_like(original).copy_(values)
    if tensor.is_floating_point() and not all_finite(tensor):
        raise StateError(
            f"merging would write NaN or infinity into {path}; the weights stay as they were"
        )
    is_parameter = isinstance(original, nn.Parameter)
    return nn.Parameter(tensor, original.requires_grad) if is_parameter else tensor
