"""An adapter's groups, and an optimizer that forgot some of them."""

from __future__ import annotations

import pytest
import torch

import lorakin as lk
from conftest import tiny_bert, tiny_llama


def test_every_trainable_tensor_is_in_exactly_one_group() -> None:
    adapter = lk.adapt(tiny_bert(), lk.LoRA(rank=2), modules_to_save=["classifier"])
    groups = adapter.parameter_groups(lr=1e-3, weight_decay=0.1)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert sum(p.numel() for p in held) == adapter.trainable_parameters
    assert {id(p) for p in held} == {id(p) for p in adapter.model.parameters() if p.requires_grad}
    assert all(group["lr"] == 1e-3 and group["weight_decay"] == 0.1 for group in groups)


def test_the_default_decay_is_none_and_other_options_pass_through() -> None:
    adapter = lk.adapt(tiny_llama(), lk.LoRA(rank=2))
    optimizer = adapter.optimizer(lr=1e-3, betas=(0.8, 0.9))
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert adapter.optimizer(torch.optim.AdamW, lr=1e-3, weight_decay=0.2).param_groups[0]["weight_decay"] == 0.2
    assert adapter.optimizer(torch.optim.Rprop, lr=1e-3).param_groups[0]["lr"] == 1e-3


def test_an_optimizer_that_holds_too_little_is_refused() -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRA(rank=2))
    own = torch.optim.SGD(adapter.parameter_groups(lr=0.1))
    assert adapter.attach(own) is own
    half = torch.optim.SGD(adapter.parameters()[::2], lr=0.1)
    with pytest.raises(lk.SettingError, match=r"holds none of 14 trainable tensors .*parameter_groups"):
        adapter.attach(half)
