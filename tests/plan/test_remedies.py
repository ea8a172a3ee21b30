"""What makes a plan fit into memory."""

from __future__ import annotations

from lorakin.family import method_named
from lorakin.plan.prediction import plan_method
from lorakin.plan.remedies import remedies
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
