"""What an adapter tells an optimizer: its parameter groups, and that nothing of it was left out."""

from __future__ import annotations

from typing import Any

import torch

from lorakin.errors import SettingError
from lorakin.surgery.graft import Graft


def parameter_groups(graft: Graft, lr: float, **options: Any) -> list[dict[str, Any]]:
    """The adapter's trainable tensors as optimizer groups, each tensor in exactly one.

    Args:
        graft: the adapter.
        lr: the learning rate.
        options: other options of the optimizer, put into every group.

    Raises:
        SettingError: the adapter has nothing to train (it was loaded with trainable=False).
    """
    trained = list({id(p): p for _, p in graft.named_parameters() if p.requires_grad}.values())  # a tied one once
    if not trained:
        raise SettingError(f"adapter {graft.name!r} has nothing to train; load it with trainable=True")
    return [{"params": trained, "lr": lr, **options}]


def check_attached(graft: Graft, optimizer: torch.optim.Optimizer) -> None:
    """Raise `SettingError` unless `optimizer` holds every trainable tensor of the adapter."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in graft.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise SettingError(
            f"the optimizer holds none of {len(missing)} trainable tensors of adapter {graft.name!r} "
            f"({missing[0]}, …); build it from adapter.parameter_groups(lr=…)"
        )
