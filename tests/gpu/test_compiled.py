"""torch.compile with inductor's kernels in a CUDA graph, which only a real GPU has."""

from __future__ import annotations

import pytest
import torch

import lorakin as lk
from gpu.common import GPU, members
from gpu.graphs import IS_PRETENDED
from inject.test_compiled import STEPS, Mixer, Run


@pytest.mark.skipif(IS_PRETENDED, reason="inductor's kernels need a real GPU")
@pytest.mark.parametrize("word", ["lora", "vera", "dora", "adalora", "delta-lora"])
def test_a_compiled_step_in_a_graph_is_the_eager_step(word: str) -> None:
    torch._dynamo.reset()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5)).to(GPU)
    eager, compiled = (
        Run(members((word,)), ids, Mixer().to(GPU), **options)
        for options in ({}, {"mode": "reduce-overhead"})
    )
    for _ in range(STEPS):
        assert compiled.step() == pytest.approx(eager.step(), rel=1e-4)


@pytest.mark.skipif(IS_PRETENDED, reason="inductor's kernels need a real GPU")
def test_each_replay_of_a_compiled_forward_drops_others() -> None:
    torch._dynamo.reset()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5)).to(GPU)
    run = Run(lk.LoRA(rank=2, dropout=0.5), ids, Mixer().to(GPU), mode="reduce-overhead")
    for _ in range(3):
        run.step()
    losses = {float(run.called(**run.batch).loss.detach()) for _ in range(5)}
    assert len(losses) == 5
