"""Bytes and seconds of a few operations, by hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lorakin.plan.traced import Traced
from plan.small import MACHINE


def test_a_peak_by_hand() -> None:
    """y = relu(x W1) W2 with x (8, 16), W1 (16, 32) and W2 (32, 16) frozen, in float32."""
    with FakeTensorMode(), Traced(MACHINE) as traced:
        with traced.phase("", makes="weights"):
            first, second = torch.empty(16, 32), torch.empty(32, 16)
        x = torch.empty(8, 16, requires_grad=True)
        with traced.phase("forward", makes="activations"):
            y = torch.relu(x @ first) @ second
        assert traced.alive["weights"] == 4 * 2 * 16 * 32
        assert traced.peaks["forward"].kinds["activations"] == 4 * (
            8 * 32 + 8 * 32
        )  # x W1 and relu of it
        assert traced.alive["activations"] == 4 * (8 * 32 + 8 * 16)
        del y
        assert traced.alive["activations"] == 0
    assert traced.seconds["forward"] == pytest.approx(
        MACHINE.seconds(2 * 8 * 16 * 32, 4 * (8 * 16 + 16 * 32 + 8 * 32))
        + MACHINE.seconds(0, 4 * 2 * 8 * 32)
        + MACHINE.seconds(2 * 8 * 32 * 16, 4 * (8 * 32 + 32 * 16 + 8 * 16))
    )
