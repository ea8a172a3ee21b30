"""A model that Accelerate spread over two GPUs, or that is moved, adapted before or after."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

import lorakin as lk
from conftest import tiny_llama
from gpu.common import (
    CPU,
    GPU,
    LEGAL,
    SINGLE,
    STARTS,
    STEPS,
    adapted,
    batch_for,
    losses_of,
    members,
    moved_from_start,
)
from lorakin.family import Method

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SECOND = torch.device("cuda", 1)
LAYERS = 4
BY_DATA = ("eva", "lora-ga")


def llama() -> Any:
    return tiny_llama(tied=False, num_hidden_layers=LAYERS)


KEPT: list[torch.Tensor] = []
"""What lay on the CPU before. Accelerate knows tied tensors by their addresses, and a pretended GPU
would use that memory again, which a real one cannot."""


def spread(model: Any, last_layer: int | str = 1) -> Any:
    """Puts the second half of a model's layers on the second GPU."""
    KEPT[:] = [parameter.data for parameter in model.parameters()]
    places: dict[str, int | str] = {"model.embed_tokens": 0, "model.rotary_emb": 0}
    places |= {f"model.layers.{n}": int(n >= LAYERS // 2) for n in range(LAYERS)}
    places |= {f"model.layers.{LAYERS - 1}": last_layer, "model.norm": 1, "lm_head": 1}
    return dispatch_model(model, places, main_device="cuda:0", offload_buffers=last_layer == "cpu")


def on_one(words: tuple[str, ...]) -> tuple[Any, lk.Adapter, dict[str, torch.Tensor]]:
    model = llama()
    adapter, batch = adapted(model, words, GPU)
    return model, adapter, batch


def spread_before(words: tuple[str, ...]) -> tuple[Any, lk.Adapter, dict[str, torch.Tensor]]:
    model = spread(llama())
    batch = batch_for(model, GPU)
    method = Method.of(members(words))
    looks = method.needed_probe is not None or method.measured_member is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rank_above", lk.LorakinWarning)
        adapter = lk.adapt(
            model, method, seed=0, probe=[batch] if looks else None, rank_above="clamp"
        )
    return model, adapter, batch


def spread_after(words: tuple[str, ...]) -> tuple[Any, lk.Adapter, dict[str, torch.Tensor]]:
    model = llama()
    adapter, _ = adapted(model, words, CPU)
    return spread(model), adapter, batch_for(model, GPU)


WAYS: dict[str, Callable[..., Any]] = {"adapted then spread": spread_after, "spread": spread_before}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("words", SINGLE, ids="+".join)
def test_two_gpus_are_one(words: tuple[str, ...], way: str, tmp_path: Path) -> None:
    """Training, merging, and files that hold the same adapter as on one."""
    want = losses_of(*on_one(words))
    model, adapter, batch = WAYS[way](words)
    got = losses_of(model, adapter, batch)
    if not (words[0] in BY_DATA and way == "spread"):  # whose first directions may have other signs
        assert got == pytest.approx(want, abs=1e-3)

    model.eval()
    ids = batch["input_ids"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model(ids).logits.to(GPU)
        adapter.merge()
        torch.testing.assert_close(model(ids).logits.to(GPU), logits, rtol=0, atol=1e-4)
        adapter.unmerge()
        adapter.save(tmp_path)
        for fresh, device in ((llama(), CPU), (spread(llama()), GPU)):
            lk.load(fresh, tmp_path)
            out = fresh(ids.to(device)).logits.to(GPU)
            torch.testing.assert_close(out, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "words", [w for w in LEGAL if len(w) > 1 and not set(w) & set(STARTS)], ids="+".join
)
def test_combinations_train_on_two_gpus(words: tuple[str, ...]) -> None:
    model, adapter, batch = spread_before(words)
    losses = losses_of(model, adapter, batch)
    assert losses[-1] < losses[0]
    assert {p.device for p in adapter.parameters()} == {GPU, SECOND}


def test_importance_on_two_gpus_is_that_of_one() -> None:
    member = lk.LoRADrop(rank=4, keep=4)
    shares = []
    for model in (llama().to(GPU), spread(llama())):
        shares.append(lk.importance(model, member, [batch_for(model, GPU)], seed=0))
    assert shares[1] == pytest.approx(shares[0], abs=1e-4)


@pytest.mark.parametrize("way", ["one", "two"])
def test_conversion_on_data(way: str) -> None:
    model = llama().to(GPU) if way == "one" else spread(llama())
    adapter = moved_from_start(lk.adapt(model, lk.DoRA(rank=4), seed=0))
    batch = batch_for(model, GPU)
    del batch["labels"]
    with torch.no_grad():
        want = model(**batch).logits
    plain = lk.as_lora(adapter, rank=32, batches=[batch])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-2)
    assert {p.device for p in plain.adapter.parameters()} == {
        p.device for p in adapter.parameters()
    }


def test_combining_on_two_gpus() -> None:
    model = spread(llama())
    for n, rank in enumerate((4, 2)):
        moved_from_start(lk.adapt(model, lk.LoRA(rank=rank), name=f"a{n}", seed=n))
    assert lk.combine(model, {"a0": 0.5, "a1": 0.5}, rank=3).adapter.method is not None
    with torch.no_grad():
        model(**batch_for(model, GPU))


@pytest.mark.parametrize("words", [w for w in SINGLE if w[0] not in STARTS], ids="+".join)
def test_a_model_may_move_to_another_gpu_while_it_trains(words: tuple[str, ...]) -> None:
    losses = []
    for moves in (False, True):
        model, adapter, batch = on_one(words)
        optimizer = adapter.optimizer(torch.optim.SGD, lr=1e-2, total_steps=STEPS)
        model.train()
        of_run = []
        for n in range(STEPS):
            if moves and n == STEPS // 2:
                model.to(SECOND)
                batch = {key: tensor.to(SECOND) for key, tensor in batch.items()}
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            of_run.append(loss.item())
        losses.append(of_run)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "trains"), itertools.product([("lora",), ("dora",), ("vera",)], [False, True])
)
def test_a_layer_offloaded_after_adapting(words: tuple[str, ...], trains: bool) -> None:
    """The last layer on the CPU, moved to the GPU by Accelerate for each call."""
    model = llama()
    adapter, _ = adapted(model, words, CPU)
    moved_from_start(adapter)
    for parameter in adapter.parameters():
        parameter.requires_grad_(parameter.requires_grad and trains)
    batch = batch_for(model, CPU)
    with torch.no_grad():
        want = model(**batch).logits
    model = spread(model, last_layer="cpu")
    with torch.no_grad():
        got = model(**{key: tensor.to(GPU) for key, tensor in batch.items()}).logits
    torch.testing.assert_close(got.to(CPU), want, rtol=0, atol=1e-4)
