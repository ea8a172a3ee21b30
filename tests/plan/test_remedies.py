"""What makes a plan fit into memory."""

from __future__ import annotations

import pytest

from lorakin.family import method_named
from lorakin.plan import remedies as remedies_module
from lorakin.plan.prediction import plan_method
from lorakin.plan.remedies import doubled_batch, remedies
from plan.small import conditions


def test_the_largest_batch_and_remedies_fit_and_the_next_does_not() -> None:
    method = method_named("lora", {})
    where = [
        conditions(1, batch_size=rows, max_length=64, targets=["q_proj"]) for rows in (2, 4, 8)
    ]
    two, four, _ = (plan_method(there, method, 1.0).peak for there in where)
    room = (two + four) // 2
    found = dict(remedies(where[2], method, room))
    assert found["--batch-size 2"].peak == two <= room < four
    assert all(plan.peak <= room for plan in found.values())
    assert remedies(where[2], method, 10) == []


def test_a_batch_is_doubled_as_often_as_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    method, small = method_named("lora", {}), conditions(1, batch_size=3, padded=True)
    monkeypatch.setattr(remedies_module, "LARGEST_BATCH", 24)
    peaks = {
        rows: plan_method(conditions(1, batch_size=rows, padded=True), method, 1.0).peak
        for rows in (3, 6, 12, 24)
    }
    plan = plan_method(small, method, 1.0)
    for most, peak in peaks.items():
        rows, larger = doubled_batch(small, method, plan, peak, None)
        assert (rows, larger.peak) == (most, peak)
    assert doubled_batch(small, method, plan, 10 * peak, None)[0] == 24
    assert doubled_batch(small, method, plan, 10, None) == (3, plan)
