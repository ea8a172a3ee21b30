"""Training on a float16 base, whose gradients must be scaled.

An adapter's tensors are float32 whatever the base is, but their gradients pass the base's float16,
where anything below 6e-8 is 0. Without scaling, one tensor's gradient was 4 % off in one batch, and
0 where the loss was small. So the loss is multiplied before the backward, the gradients are divided
after it, and a step whose gradients overflowed is skipped (Micikevicius et al., section 3.2,
https://arxiv.org/abs/1710.03740).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lorakin.errors import SettingError, some

FIRST_SCALE = 2.0**14
"""The scale that a run begins with; torch's 65536 overflows in more of the first steps."""


def is_half(model: nn.Module) -> bool:
    """Returns whether a gradient passes float16 on its way through the model.

    >>> is_half(nn.Linear(2, 2)), is_half(nn.Linear(2, 2).half())
    (False, True)
    """
    return any(parameter.dtype is torch.float16 for parameter in model.parameters())


def loss_scaler(model: nn.Module) -> torch.amp.GradScaler:
    """Returns a scaler for losses of the model; it does nothing unless the base is float16.

    Raises:
        SettingError: what trains is float16 itself, which loses small steps whatever the gradients
            are.

    >>> loss_scaler(nn.Linear(2, 2)).is_enabled()
    False
    """
    enabled = is_half(model)
    if enabled:
        check_no_float16_training(model)
    device = next((p.device.type for p in model.parameters() if p.dtype is torch.float16), "cpu")
    return torch.amp.GradScaler(device, init_scale=FIRST_SCALE, enabled=enabled)


def check_no_float16_training(model: nn.Module) -> None:
    """Checks that nothing in the model trains in float16.

    Raises:
        SettingError: something does, such as a module trained whole.
    """
    narrow = [
        name for name, p in model.named_parameters() if p.requires_grad and p.dtype is torch.float16
    ]
    if narrow:
        raise SettingError(
            f"{some(narrow)} would be trained in float16, where most steps are too small to be "
            "seen; load the base with --dtype bfloat16 or float32, or train no module whole"
        )


def leave_unscaling_to_the_scaler(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Gives fused optimizers plain gradients, and no step at all if these overflowed.

    They can unscale gradients themselves. But then the hooks on their steps would see scaled
    gradients, and steps that do nothing.
    """
    for optimizer in optimizers:
        if hasattr(optimizer, "_step_supports_amp_scaling"):
            optimizer._step_supports_amp_scaling = False
