"""torch.compile on a GPU: on a real one inductor's kernels, replayed as a CUDA graph.

On the pretended GPU forward and backward are traced alike, and run by torch's own kernels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import lorakin as lk
from gpu.common import GPU, members
from gpu.graphs import IS_PRETENDED
from inject.test_compiled import STEPS, Mixer, Run

pytestmark = pytest.mark.filterwarnings("ignore::lorakin.errors.LorakinWarning")
HOW: dict[str, Any] = {"backend": "aot_eager"} if IS_PRETENDED else {"mode": "reduce-overhead"}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def batch_of_ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5)).to(GPU)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("word", ["lora", "vera", "dora", "adalora", "delta-lora"])
def test_compiled_steps_are_eager_steps(word: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    eager, compiled = (
        Run(members((word,)), batch_of_ids(), Mixer().to(GPU, dtype), **options)
        for options in ({}, HOW)
    )
    for _ in range(STEPS):
        assert compiled.step() == pytest.approx(eager.step(), rel=TOLERANCE[dtype])


@pytest.mark.parametrize("method", [lk.LoRA(rank=2), lk.VeRA(rank=4), lk.DoRA(rank=2)], ids=repr)
def test_each_compiled_forward_drops_others(method: Any) -> None:
    torch._dynamo.reset()
    run = Run(
        dataclasses.replace(method, dropout=0.5),
        batch_of_ids(),
        Mixer().to(GPU),
        **HOW,
    )
    for _ in range(STEPS):
        run.step()
    assert len({float(run.called(**run.batch).loss.detach()) for _ in range(20)}) > 1
