"""Folding adapters into the weights of one module and taking them out again, bit for bit.

The base's own parameters are set aside, not overwritten, and come back as the same objects. That costs one more copy
of each adapted weight while merged, and it leaves a tied partner of the weight as it was.
"""

from __future__ import annotations

import torch
from torch import nn

from lorakin.errors import StateError
from lorakin.surgery.adapted import Copy, Hung, Site


def set_merged(module: nn.Module, path: str, names: tuple[str, ...]) -> None:
    """Make the module's parameters those of the base with the adapters `names` folded in; () restores the base's own.

    The weight is computed from W0 in float32 (float64 for a float64 base) and rounded once, so that merging several
    adapters one by one gives the bits of merging them at once.

    Raises:
        StateError: a merged weight would not be finite; the module is left as it was.
    """
    hung = module.lorakin
    assert isinstance(hung, Hung)
    if names:
        base = hung.base or dict(_own_parameters(module))
        replacement = _folded(base, path, [hung[name] for name in names])
        hung.base = base
    else:
        replacement, hung.base = hung.base, {}
    for key, parameter in replacement.items():
        owner, _, leaf = key.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
    hung.merged = names


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    hung = module.lorakin
    assert isinstance(hung, Hung)
    site = any(isinstance(child, Site) for child in hung.children())
    own = [(key, p) for key, p in module.named_parameters(remove_duplicate=False) if not key.startswith("lorakin.")]
    return [(key, p) for key, p in own if key == "weight"] if site else own


@torch.no_grad()
def _folded(base: dict[str, nn.Parameter], path: str, adapters: list[Site | Copy]) -> dict[str, nn.Parameter]:
    if isinstance(adapters[-1], Copy):
        trained = dict(adapters[-1].module.named_parameters(remove_duplicate=False))
        return {key: nn.Parameter(trained[key].detach().clone(), p.requires_grad) for key, p in base.items()}
    sites = [adapter for adapter in adapters if isinstance(adapter, Site)]
    weight, layer = base["weight"], sites[0].layer
    changed = wide = layer.matrix(weight.detach()).to(torch.promote_types(weight.dtype, torch.float32))
    for site in sites:
        pair = site.pair()
        if (pair.up.shape[0], pair.down.shape[1]) != wide.shape:
            raise StateError(
                f"{path} is now {' × '.join(map(str, wide.shape))}, but its adapter was made for {pair.up.shape[0]} × "
                f"{pair.down.shape[1]}: something, such as resize_token_embeddings, changed it; do that before adapting"
            )
        folded = pair.applied_to(wide)
        changed = folded if changed is wide else changed + (folded - wide)
    new = torch.empty_like(weight)
    layer.matrix(new).copy_(changed)
    if not torch.isfinite(new).all():
        raise StateError(f"merging would write NaN or infinity into {path}; the weights are left as they were")
    return {"weight": nn.Parameter(new, weight.requires_grad)}
