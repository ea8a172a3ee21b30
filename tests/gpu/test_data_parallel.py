"""nn.DataParallel, into which a Trainer wraps a model where it sees several GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpu.common import GPU, SINGLE, adapted, losses_of
from gpu.test_two_gpus import llama

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("words", SINGLE, ids="+".join)
def test_it_trains_as_one_gpu_does(words: tuple[str, ...]) -> None:
    losses = []
    for parallel in (False, True):
        model = llama()
        adapter, batch = adapted(model, words, GPU)
        called = nn.DataParallel(model) if parallel else model
        losses.append(losses_of(called, adapter, batch, torch.optim.SGD, lr=1e-2))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
