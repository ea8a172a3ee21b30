"""GradScaler on one GPU and on two: a step that overflows is none, for members' rules too."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import lorakin as lk
from gpu.common import GPU, adapted
from gpu.test_two_gpus import llama, spread_before

WORDS = [("lora",), ("dora",), ("adalora",), ("delta-lora",)]
STEPS = 8
OVERFLOWS = {1: "the last tensor", 3: "all tensors"}


def overflow(adapter: lk.Adapter, where: str) -> None:
    trained = [p for p in adapter.parameters() if p.grad is not None]
    for parameter in trained[-1:] if where == "the last tensor" else trained:
        assert parameter.grad is not None
        parameter.grad.fill_(float("inf"))


@pytest.mark.parametrize(
    ("gpus", "fused", "unscale"), itertools.product((1, 2), (True, False), (True, False))
)
@pytest.mark.parametrize("words", WORDS, ids="+".join)
def test_a_step_that_overflows_is_none(
    words: tuple[str, ...], gpus: int, fused: bool, unscale: bool
) -> None:
    if gpus > torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    if gpus == 1:
        model: Any = llama()
        adapter, batch = adapted(model, words, GPU)
    else:
        model, adapter, batch = spread_before(words)
    optimizer = adapter.optimizer(torch.optim.AdamW, lr=1e-3, total_steps=20, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=128.0)
    model.train()
    done = 0
    for n in range(STEPS):
        before = [p.detach().clone() for p in adapter.parameters()]
        with torch.autocast("cuda", torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        if n in OVERFLOWS:
            overflow(adapter, OVERFLOWS[n])
        if unscale:
            scaler.unscale_(optimizer)
            trained = [p for p in adapter.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(
            b.shape != p.shape or not torch.equal(b, p)
            for b, p in zip(before, adapter.parameters(), strict=True)
        )
        assert moved == (n not in OVERFLOWS)
        done += moved
        assert adapter.run.steps == done
    assert all(torch.isfinite(p).all() for p in adapter.parameters())
