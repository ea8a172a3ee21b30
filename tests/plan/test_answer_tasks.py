"""Plans of preference tuning and reward models: what TRL's own step takes on real tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorakin as lk
from lorakin.family import method_named
from lorakin.plan.conditions import Conditions
from lorakin.plan.rehearsal import EVALUATION, FORWARD, STEP, rehearse_whole
from plan.small import MACHINE, conditions, real_steps, small


@pytest.mark.parametrize("task", ["dpo", "orpo", "kto", "reward"])
def test_plans_are_of_the_real_steps(task: str) -> None:
    few: dict[str, Any] = {"batch_size": 4, "max_length": 24, "padded": False}
    config = small(num_labels=1, pad_token_id=0) if task == "reward" else small()
    where = Conditions(config, torch.float32, task=task, **few)
    method = method_named("lora", {})
    planned = rehearse_whole(where, method, MACHINE)

    torch.manual_seed(0)
    adapter, traced = real_steps(where, method)
    assert planned.trainable_parameters == adapter.trainable_parameters
    for phase in (FORWARD, STEP):
        real = traced.peaks[phase].total
        # TRL's loop over rows for ORPO frees a little more on real tensors.
        off = 6e-2 if task == "orpo" else 5e-3
        assert planned.peaks[phase].total == pytest.approx(real, rel=off), phase


def peaks(task: str, **changes: Any) -> dict[str, int]:
    where = conditions(task=task, **changes)
    found = rehearse_whole(where, method_named("lora", {}), MACHINE)
    return {phase: peak.total for phase, peak in found.peaks.items()}


def test_pairs_take_twice_the_rows_and_an_evaluation_as_many_texts() -> None:
    """DPO forms no logits in training; its evaluation does, of one text for each row."""
    pairs, texts = peaks("dpo", batch_size=4), peaks("language", batch_size=4)
    assert pairs[FORWARD] > texts[FORWARD]
    assert pairs[EVALUATION] == pytest.approx(texts[EVALUATION], rel=0.05)


def test_pairs_have_no_classes() -> None:
    with pytest.raises(lk.SettingError):
        Conditions(small(), torch.float32, labels=3, task="dpo").model()
