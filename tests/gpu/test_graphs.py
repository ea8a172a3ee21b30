"""CUDA graphs: a captured training step, replayed, is the step that runs eagerly.

Forward and backward of every member can be captured. The optimizer's step can be too, with
`capturable=True`, unless a member does other things at other steps (AdaLoRA, Delta-LoRA): that is
Python, which a replay does not run, and so it is refused.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lorakin as lk
from gpu.common import GPU, MODELS, SINGLE, STARTS, Stack, adapted, moved_from_start
from gpu.graphs import IS_PRETENDED, Graph

STEPS = 4
ACTING = [("adalora",), ("delta-lora",)]
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "autocast": {"autocast": torch.bfloat16},
    "bfloat16 base": {"dtype": torch.bfloat16},
}


class Trained:
    """A model that learns batches which lie in the same memory."""

    def __init__(
        self,
        members: Any,
        dtype: torch.dtype = torch.float32,
        autocast: torch.dtype | None = None,
        fuse: bool = False,
        **options: Any,
    ) -> None:
        self.autocast = autocast
        self.model = MODELS["llama"]().to(GPU, dtype)
        if isinstance(members, tuple):
            self.adapter, _ = adapted(self.model, members, GPU)
        else:
            self.adapter = lk.adapt(self.model, members, seed=0)
        if fuse:
            lk.fuse(self.model)
        self.optimizer = self.adapter.optimizer(lr=1e-3, total_steps=20, **options)
        self.ids = torch.zeros(2, 9, dtype=torch.long, device=GPU)
        self.batches = torch.Generator().manual_seed(3)
        self.model.train()

    def next_batch(self) -> None:
        self.ids.copy_(torch.randint(3, 64, (2, 9), generator=self.batches))

    def backward(self) -> torch.Tensor:
        """Forward and backward from gradients that are None, as torch asks before a capture."""
        self.optimizer.zero_grad()
        on = self.autocast is not None
        with torch.autocast("cuda", self.autocast, on, cache_enabled=False):
            loss: torch.Tensor = self.model(self.ids, labels=self.ids).loss
        loss.backward()
        return loss.detach()


# A start trains a plain pair: one way will do for it.
CASES = [
    (words, how) for words in SINGLE for how in HOW if words[0] not in STARTS or how == "plain"
]
CASES += [((word, "dora"), "plain") for word in ("vera", "adalora", "delta-lora")]
if not IS_PRETENDED:  # Triton's interpreter takes half a minute
    HOW["fused"] = {"fuse": True}
    CASES.append((("lora",), "fused"))


@pytest.mark.parametrize(
    ("words", "how"), CASES, ids=lambda case: case if isinstance(case, str) else "+".join(case)
)
def test_replays_are_eager_steps(words: tuple[str, ...], how: str) -> None:
    eager, captured = (Trained(words, **HOW[how]) for _ in range(2))
    for one in (eager, captured):
        one.next_batch()
        one.backward()
        one.optimizer.step()
    graph = Graph(captured.backward)
    for _ in range(STEPS):
        eager.next_batch()
        loss = eager.backward()
        eager.optimizer.step()
        captured.next_batch()
        graph.replay()
        torch.testing.assert_close(graph.result, loss, rtol=1e-5, atol=1e-6)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            captured.optimizer.step()
        if any("capture it again" in str(warning.message) for warning in caught):
            assert "delta-lora" in words
            graph = Graph(captured.backward)


@pytest.mark.parametrize(
    "given",
    [*SINGLE, lk.LoRAFA(rank=2, corrected=True)],
    ids=lambda given: "+".join(given) if isinstance(given, tuple) else "lora-fa, corrected",
)
def test_the_optimizers_step_is_captured_or_refused(given: Any) -> None:
    eager, captured = (Trained(given, capturable=True) for _ in range(2))

    def step() -> torch.Tensor:
        loss = captured.backward()
        captured.optimizer.step()
        return loss

    captured.next_batch()
    if given in ACTING:
        with pytest.raises(lk.StateError, match="Capture the forward and the backward"):
            Graph(step)
        return
    eager.next_batch()
    for _ in range(3):
        eager.backward()
        eager.optimizer.step()
    graph = Graph(step)
    for _ in range(STEPS):
        eager.next_batch()
        loss = eager.backward()
        eager.optimizer.step()
        captured.next_batch()
        graph.replay()
        torch.testing.assert_close(graph.result, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("members", "step"),
    [
        (lk.DeltaLoRA(rank=2, start_step=3), 3),
        (lk.DeltaLoRA(rank=2, start_step=2, update="in_place"), 3),
        (lk.AdaLoRA(initial_rank=4, target_rank=2, start=1, finish=16), 4),
    ],
    ids=["delta-lora", "delta-lora, in place", "adalora"],
)
def test_a_member_with_other_tensors_asks_for_another_graph(members: Any, step: int) -> None:
    trained = Trained(members)
    trained.next_batch()
    trained.backward()
    trained.optimizer.step()
    graph = Graph(trained.backward)
    for n in range(2, step + 1):
        graph.replay()
        with (
            pytest.warns(lk.LorakinWarning, match=f"after step {n}.* capture it again")
            if n == step
            else contextlib.nullcontext()
        ):
            trained.optimizer.step()


def identity(members: Any) -> tuple[Stack, lk.Adapter]:
    """A layer of zeros with an adapter whose pair is the identity: its output is s·x̃."""
    stack = Stack(1, 16).to(GPU).requires_grad_(False)
    stack.layers[0].weight.zero_()
    adapter = lk.adapt(stack, members, "all-linear", seed=0)
    tensors = adapter.tensors.branch("layers.0").tensors()
    with torch.no_grad():
        for slot in ("A", "B"):
            tensors[slot].copy_(torch.eye(16))
    return stack.train(), adapter


def test_each_replay_drops_other_entries_and_the_same_in_the_backward() -> None:
    stack, _ = identity(lk.LoRA(rank=16, alpha=16, dropout=0.5))
    x = torch.ones(64, 16, device=GPU, requires_grad=True)

    def step() -> tuple[torch.Tensor, torch.Tensor | None]:
        x.grad = None
        y = stack(x)
        y.backward(torch.ones_like(y))
        return y.detach(), x.grad

    graph = Graph(step)
    seen = []
    for _ in range(3):
        graph.replay()
        y, grad = graph.result
        assert torch.equal(y, grad)
        assert set(y.unique().tolist()) == {0.0, 2.0}
        assert 0.4 < (y == 0).float().mean() < 0.6
        seen.append(y.clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


DROPPED: dict[str, Callable[[], Any]] = {
    "lora": lambda: lk.LoRA(rank=8, dropout=0.3),
    "vera": lambda: lk.VeRA(rank=8, dropout=0.3),
    "dora": lambda: lk.DoRA(rank=8, dropout=0.3),
    "adalora": lambda: lk.AdaLoRA(initial_rank=8, dropout=0.3, total_steps=100),
}


@pytest.mark.parametrize("method", DROPPED)
def test_replays_with_dropout_are_random_and_right_on_average(method: str) -> None:
    stack = Stack(1, 16).to(GPU)
    moved_from_start(lk.adapt(stack, DROPPED[method](), "all-linear", seed=0))
    x = torch.randn(32, 16, device=GPU, requires_grad=True)

    def step() -> torch.Tensor:
        x.grad = None
        y: torch.Tensor = stack.train()(x)
        y.sum().backward()
        return y.detach()

    graph = Graph(step)
    outputs = []
    for _ in range(200):
        graph.replay()
        outputs.append(graph.result.clone())
    stacked = torch.stack(outputs)
    assert stacked.std(0).max() > 0
    with torch.no_grad():
        change = (stacked.mean(0) - stack.eval()(x)).abs()
    assert (change < 6 * stacked.std(0) / 200**0.5 + 1e-5).all()


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16), (3, 1, 16)], ids=str)
@pytest.mark.parametrize("method", DROPPED)
def test_dropout_in_a_graph_for_inputs_of_any_shape(method: str, shape: tuple[int, ...]) -> None:
    """The layer is linear: its gradient times its input is its output."""
    stack = Stack(1, 16).to(GPU)
    moved_from_start(lk.adapt(stack, DROPPED[method](), "all-linear", seed=0))
    x = torch.randn(shape, device=GPU, requires_grad=True)

    def step() -> tuple[torch.Tensor, torch.Tensor | None]:
        x.grad = None
        y = stack.train()(x)
        y.sum().backward()
        return y.detach(), x.grad

    graph = Graph(step)
    for _ in range(2):
        graph.replay()
        y, grad = graph.result
        torch.testing.assert_close((x.detach() * grad).sum(), y.sum(), rtol=1e-4, atol=1e-4)


def test_veras_products_of_an_eager_forward_are_not_in_the_graph() -> None:
    stack = Stack(1, 16).to(GPU)
    moved_from_start(lk.adapt(stack, lk.VeRA(rank=8), "all-linear", seed=0))
    x = torch.randn(3, 16, device=GPU, requires_grad=True)
    alive = stack.train()(x)
    graph = Graph(lambda: stack(x).detach(), before=0)
    with torch.no_grad():
        x.mul_(-2)
    graph.replay()
    torch.testing.assert_close(graph.result, stack(x).detach())
    assert alive.grad_fn is not None


def test_a_captured_inference_reads_the_adapter_and_keeps_no_pair() -> None:
    stack = Stack(1, 16).to(GPU)
    adapter = moved_from_start(lk.adapt(stack, lk.DoRA(rank=4), "all-linear", seed=0))
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(3, 16, device=GPU)
    with torch.no_grad():
        stack.eval()(x)
        graph = Graph(lambda: stack(x))
        for parameter in adapter.parameters():
            parameter.mul_(1.5)
        graph.replay()
        torch.testing.assert_close(graph.result, stack(x))
