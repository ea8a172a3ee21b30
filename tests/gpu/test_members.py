"""Every member on a GPU is what it is on the CPU: gradients, and what is done with an adapter."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakin as lk
from conftest import small
from gpu.common import (
    CPU,
    GPU,
    LEGAL,
    MODELS,
    SINGLE,
    STARTS,
    STEPS,
    Stack,
    adapted,
    batch_for,
    moved_from_start,
)

CASES = [("llama", words) for words in LEGAL] + [
    (kind, words) for kind, words in itertools.product(MODELS, SINGLE) if kind != "llama"
]


@pytest.mark.parametrize(
    ("kind", "words"), CASES, ids=lambda case: "+".join(case) if isinstance(case, tuple) else case
)
def test_gradients_are_those_of_the_cpu(kind: str, words: tuple[str, ...]) -> None:
    """Of the first step: the trajectory after it would only tell how Adam amplifies rounding."""
    gradients = []
    for device in (CPU, GPU):
        model = MODELS[kind]().to(device)
        adapter, batch = adapted(model, words, device)
        moved_from_start(adapter)
        model.train()
        model(**batch).loss.backward()
        gradients.append([p.grad.cpu() for p in adapter.parameters() if p.grad is not None])
    for on_cpu, on_gpu in zip(*gradients, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("words", [("eva",), ("lora-ga",)], ids="+".join)
def test_a_start_by_data_is_that_of_the_cpu(words: tuple[str, ...]) -> None:
    """The space of the first directions: they may have other signs, and turn where values tie."""
    spaces = []
    for device in (CPU, GPU):
        model = MODELS["llama"]().to(device)
        probe = [batch_for(model, device)]
        adapter = lk.adapt(model, small(*words, rank=4), "q_proj", seed=0, probe=probe)
        assert {parameter.device for parameter in adapter.parameters()} == {device}
        pairs = [adapter.tensors.pair_now(path) for path in adapter.placement.methods]
        spaces.append([torch.linalg.qr(pair.down.T.cpu().double()).Q for pair in pairs])
    for on_cpu, on_gpu in zip(*spaces, strict=True):
        torch.testing.assert_close(on_gpu @ on_gpu.T, on_cpu @ on_cpu.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1e-2, 1e-4, 0.0])
@pytest.mark.parametrize("bias", [True, False])
def test_small_gains_have_the_gradients_of_the_cpu(
    bias: bool, factor: float, dtype: torch.dtype
) -> None:
    """With a bias a small gain leaves few digits in what the layer returns; 0 leaves none."""
    gradients = []
    for device in (CPU, GPU):
        stack = Stack(1, 8, bias).to(device, dtype)
        adapter = moved_from_start(lk.adapt(stack, lk.DoRA(rank=2), "all-linear", seed=0))
        magnitude = adapter.tensors.branch("layers.0").m
        with torch.no_grad():
            magnitude[:3].mul_(factor)
        x, weights = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
        (stack.train()(x.to(device)) * weights.to(device)).sum().backward()
        gradients.append(magnitude.grad.cpu())
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(gradients[1], gradients[0], rtol=rtol, atol=rtol)


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "unfused optimizer": {"fused": False},
    "checkpointed": {"reentrant": False},
    "reentrant": {"reentrant": True},
    "bfloat16 autocast": {"autocast": torch.bfloat16},
    "float16 autocast": {"autocast": torch.float16},
    "bfloat16 base": {"dtype": torch.bfloat16},
}


def trained(
    words: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    reentrant: bool | None = None,
    fused: bool | None = None,
) -> tuple[Any, lk.Adapter, list[float]]:
    """A model trained for `STEPS` steps, its adapter, and the losses."""
    model = MODELS["llama"]().to(device, dtype)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.config.use_cache = False
        if reentrant:
            model.enable_input_require_grads()
    adapter, batch = adapted(model, words, device)
    options = {} if fused is None else {"fused": fused}
    optimizer = adapter.optimizer(lr=1e-3, total_steps=STEPS, **options)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
    model.train()
    losses = []
    for _ in range(STEPS):
        with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), adapter, losses


# A start trains a plain pair: one way of training will do.
WAYS = [(words, how) for words in SINGLE for how in HOW if words[0] not in STARTS or how == "plain"]


@pytest.mark.parametrize(("words", "how"), WAYS, ids=[f"{w[0]}, {how}" for w, how in WAYS])
def test_training_is_that_of_the_cpu(words: tuple[str, ...], how: str) -> None:
    losses = [trained(words, device, **HOW[how])[-1] for device in (CPU, GPU)]
    narrow = "autocast" in how or "bfloat16" in how
    tolerance = 2e-2 if narrow else 1e-3
    assert losses[1] == pytest.approx(losses[0], abs=tolerance)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("words", SINGLE, ids="+".join)
def test_what_is_done_with_an_adapter(words: tuple[str, ...], tmp_path: Path) -> None:
    """Merging, switching off, files here and on the CPU, conversion, mixed batches, generation."""
    model, adapter, _ = trained(words, GPU)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(6)).to(GPU)

    def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model(ids).logits
        with adapter.disabled():
            base = model(ids).logits
        adapter.merge()
        close(model(ids).logits, logits)
        with adapter.disabled():
            assert torch.equal(model(ids).logits, base)
        adapter.unmerge()
        assert torch.equal(model(ids).logits, logits)

        adapter.save(tmp_path)
        for device in (GPU, CPU):
            fresh = MODELS["llama"]().to(device)
            lk.load(fresh, tmp_path)
            close(fresh(ids.to(device)).logits.to(GPU), logits)
        close(fresh.to(GPU)(ids).logits, logits)
        adapter.restore(tmp_path)
        assert torch.equal(model(ids).logits, logits)

        plain = lk.as_lora(adapter, rank=32)
        close(model(ids).logits, logits, 1e-3)
        plain.adapter.remove()

        lk.activate(model, adapter.name)
        second = moved_from_start(lk.adapt(model, lk.LoRA(rank=2), name="second", seed=1))
        for parameter in second.parameters():
            parameter.requires_grad_(False)
        lk.activate(model, adapter.name)
        with lk.mixed_batch(model, [adapter.name, None]):
            close(model(ids).logits, torch.stack((logits[0], base[1])))
        model.generate(ids, max_new_tokens=3, do_sample=False)
