"""torch.compile: one graph for every member, which stays one while it trains, with eager values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lorakin as lk
from family.test_composition import WORDS, batch, members
from lorakin.family import Method

pytestmark = pytest.mark.filterwarnings("ignore::lorakin.errors.LorakinWarning")
STEPS = 10
SINGLE = [(word,) for word in WORDS]
TOGETHER = [
    ("vera", "dora", "adalora", "lora-drop", "lora+", "delta-lora"),
    ("pissa", "dora", "lora-fa", "delta-lora"),
    ("dora", "adalora", "delta-lora"),
]


class Mixer(nn.Module):
    """A small model of linear layers, which a compiler traces in a moment."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 12)
        self.q_proj, self.k_proj = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.down_proj = nn.Linear(12, 64)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.embedding(input_ids)
        logits = self.down_proj(self.q_proj(x) * torch.tanh(self.k_proj(x)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss)


class Run:
    """A training run with a schedule of its rate, compiled if a `backend` is given."""

    def __init__(self, method: Any, ids: Tensor, model: Any = None, **compile_options: Any) -> None:
        self.model = Mixer().double() if model is None else model
        self.batch = batch(ids)
        method = Method.of(method)
        looks = method.needed_probe is not None or method.measured_member is not None
        self.adapter = lk.adapt(
            self.model,
            method,
            "*_proj",
            seed=0,
            probe=[self.batch] if looks else None,
            rank_above="clamp",
        )
        self.called = self.model.train()
        if compile_options:
            self.called = torch.compile(self.model, fullgraph=True, **compile_options)
        self.optimizer = self.adapter.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=STEPS)
        self.rate = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, STEPS)

    def step(self) -> float:
        loss = self.called(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> float:
        self.model.eval()
        loss = float(self.called(**self.batch).loss)
        self.model.train()
        return loss


def graphs_of(words: tuple[str, ...]) -> list[int]:
    """Returns the steps before which a method needs a new graph, since it has other tensors."""
    new = {1}
    if "delta-lora" in words:
        new.add(5)  # start_step is 4
    if "adalora" in words and "vera" not in words:
        new.add(STEPS - 3 + 1)  # `finish` is 3: the ranks that it freed go
    return sorted(new)


@pytest.mark.parametrize("words", SINGLE + TOGETHER, ids="×".join)
def test_one_graph_while_it_trains(words: tuple[str, ...], ids: Tensor) -> None:
    """A step, a schedule, an allocation or an evaluation between needs no other graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    eager, compiled = Run(members(words), ids), Run(members(words), ids, backend=counter)
    made = []
    for n in range(1, STEPS + 1):
        before = counter.frame_count
        assert compiled.step() == pytest.approx(eager.step(), rel=1e-9)
        made += [n] * (counter.frame_count - before)
        if n in (2, 3):
            before = counter.frame_count
            assert compiled.evaluate() == pytest.approx(eager.evaluate(), rel=1e-9)
            assert counter.frame_count - before == (n == 2), "evaluation has a graph of its own"
    assert made == graphs_of(words)


@pytest.mark.parametrize(
    "method",
    [lk.LoRA(rank=2, dropout=0.5), lk.VeRA(rank=4, dropout=0.5), lk.DoRA(rank=2, dropout=0.5)],
    ids=["lora", "vera", "dora"],
)
def test_dropout_needs_no_other_graph(method: Any, ids: Tensor) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run = Run(method, ids, backend=counter)
    for _ in range(STEPS):
        run.step()
    losses = {float(run.called(**run.batch).loss.detach()) for _ in range(5)}
    assert counter.frame_count == 1
    assert len(losses) == 5, "each forward drops others"
    compiled, run.called = run.evaluate(), run.model
    assert compiled == pytest.approx(run.evaluate(), rel=1e-12)


@pytest.mark.parametrize("words", [("lora",), ("vera",), ("dora",)], ids="×".join)
def test_over_nf4(words: tuple[str, ...], ids: Tensor) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantised() -> Any:
        model = Mixer()
        for name in ("q_proj", "k_proj"):
            plain = getattr(model, name)
            layer = bitsandbytes.nn.Linear4bit(
                12, 12, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            layer.load_state_dict(plain.state_dict())
            setattr(model, name, layer)
        return model.to("cpu")

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    eager = Run(members(words), ids, quantised())
    compiled = Run(members(words), ids, quantised(), backend=counter)
    for _ in range(STEPS):
        assert compiled.step() == pytest.approx(eager.step(), rel=1e-4)
    assert counter.frame_count == 1
