"""Plans of methods, and of quantised bases."""

from __future__ import annotations

import pytest
import torch

from lorakin.errors import SettingError
from lorakin.family import method_named
from lorakin.plan.prediction import Plan, Refusal, plan_methods, quantised
from plan.small import conditions


def test_methods_that_cannot_run_are_refused_and_the_others_planned() -> None:
    methods = [
        method_named("lora", {"rank": 4}),
        method_named("delta-lora", {"rank": 4}),
        method_named("lora", {"rank": 60}),
    ]
    plain, delta, high = plan_methods(conditions(steps=20), methods)
    assert isinstance(plain, Plan)
    assert isinstance(delta, Refusal)
    assert "start_step=500" in delta.reason
    assert isinstance(high, Refusal)
    assert "60" in high.reason


def test_quantising_is_arithmetic_over_the_linear_layers() -> None:
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    saved, largest = quantised(conditions(dtype=torch.bfloat16), "nf4")
    assert saved == round(weights * (2 - 4.127 / 8))
    assert largest == 2 * 64 * 96
    rows = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert quantised(conditions(dtype=torch.bfloat16), "int8")[0] == weights - 4 * rows
    with pytest.raises(SettingError, match="'int3'"):
        quantised(conditions(), "int3")
    # torchao's layers keep their weight in bfloat16 for the backward, with checkpointing a block's.
    for checkpointing, blocks in ((False, 1), (True, 2)):
        given = conditions(dtype=torch.bfloat16, gradient_checkpointing=checkpointing)
        assert quantised(given, "torchao-int8")[1] == 2 * weights // blocks
