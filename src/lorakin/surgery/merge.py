"""Folding adapters into the weights of one module and taking them out again, bit for bit.

The base's own parameters are set aside, not overwritten, and come back as the same objects. That costs one more copy
of each adapted weight while merged, and it leaves a tied partner of the weight as it was. Experts in one parameter are
written over, and what was there is kept aside. A quantised weight stays where it is and is not used while merged: rounding
the merged weight into so few bits again would lose most of what was learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakin.errors import StateError
from lorakin.family import Pair, all_finite
from lorakin.surgery import layers
from lorakin.surgery.experts import set_aside
from lorakin.surgery.hung import hung_on, ours
from lorakin.surgery.layers import Layer, QuantisedLayer
from lorakin.surgery.rows import Rows, check_size
from lorakin.surgery.site import Copy, Site
from lorakin.surgery.tokens import fold


def set_merged(module: nn.Module, path: str, names: tuple[str, ...], dtype: torch.dtype = torch.float32) -> None:
    """Make the module's parameters those of the base with the adapters `names` folded in; () restores the base's own.

    The weight is computed from W0 in float32 (float64 for a float64 base) and rounded once, so that merging several
    adapters one by one gives the bits of merging them at once. That of a quantised module becomes a plain one in `dtype`.

    Raises:
        StateError: a merged weight would not be finite; the module is left as it was.
    """
    hung = hung_on(module)
    names = tuple(name for name in hung.names() if name in names)  # in one order, whatever order they were merged in
    if layers.kind_of(module) is QuantisedLayer and any(isinstance(child, Site) for child in hung.values()):
        hung.dense = _dense(module, path, [hung[name] for name in names], dtype) if names else None
        hung.merged = names
        return
    if names:
        base = hung.base or _own_tensors(module)
        device = next(iter(base.values())).device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            replacement = _folded(module, base, path, [hung[name] for name in names])
        hung.base = base
    else:
        replacement, hung.base = hung.base, {}
    for key, tensor in replacement.items():
        owner, _, leaf = key.rpartition(".")
        setattr(module.get_submodule(owner), leaf, tensor)
    hung.merged = names


@torch.no_grad()
def _dense(module: nn.Module, path: str, adapters: list[Site | Copy | Rows], dtype: torch.dtype) -> Tensor:
    matrix = QuantisedLayer.weight(module).matrix
    pairs = [adapter.pair(matrix) for adapter in adapters if isinstance(adapter, Site)]
    return folded(matrix, QuantisedLayer, module, pairs, path, dtype)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The base's tensors that merging replaces: the weight, or all that a module trained whole saves."""
    hung = hung_on(module)
    if any(isinstance(child, Site | Rows) for child in hung.values()):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return {"weight": set_aside(module, weight)}
    saved, skip = module.state_dict(keep_vars=True), ours(module)
    return {key: tensor for key, tensor in saved.items() if not key.startswith(skip)}


def _folded(module: nn.Module, base: dict[str, Tensor], path: str, adapters: list[Site | Copy | Rows]) -> dict[str, Tensor]:
    sites = [adapter for adapter in adapters if isinstance(adapter, Site)]
    if rows := [adapter for adapter in adapters if isinstance(adapter, Rows)]:
        table = base["weight"]
        check_size(rows, hung_on(module), table)
        return {"weight": _like(table, fold(table.detach(), rows), path)}
    if not sites:
        return _copied(base, path, adapters)
    weight, layer = base["weight"], sites[0].layer
    matrix = layer.matrix(weight.detach())
    for site in sites:
        if site.shape[:2] != matrix.shape:
            raise StateError(
                f"{path} is now {' × '.join(map(str, matrix.shape))}, but its adapter was made for {site.shape.outputs} × "
                f"{site.shape.inputs}: something, such as resize_token_embeddings, changed it; do that before adapting"
            )
    return {"weight": folded(weight, layer, module, [site.pair(matrix) for site in sites], path)}


def folded(
    weight: Tensor, layer: type[Layer], module: nn.Module, pairs: Sequence[Pair], path: str, dtype: torch.dtype | None = None
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
    changed = wide = layer.matrix(weight.detach()).to(torch.promote_types(weight.dtype, torch.float32))
    for pair in pairs:
        one = pair.applied_to(wide)
        changed = one if changed is wide else changed + (one - wide)
    return _like(weight if dtype is None else weight.to(dtype), layer.layout(changed, module), path)


def _copied(base: dict[str, Tensor], path: str, adapters: list[Site | Copy | Rows]) -> dict[str, Tensor]:
    copies = [adapter for adapter in adapters if isinstance(adapter, Copy)]
    if len(copies) > 1:
        raise StateError(f"two adapters that train {path} whole cannot both be merged; unmerge the other first")
    trained = copies[0].module.state_dict()
    return {key: _like(tensor, trained[key], path) for key, tensor in base.items()}


def _like(old: Tensor, values: Tensor, path: str) -> Tensor:
    """`values` with the dtype and memory layout of `old`, as a parameter if that is one; refused if not finite."""
    new = torch.empty_like(old).copy_(values)
    if new.is_floating_point() and not all_finite(new):
        raise StateError(f"merging would write NaN or infinity into {path}; the weights are left as they were")
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
