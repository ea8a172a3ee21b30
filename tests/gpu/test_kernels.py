"""How many kernels a step launches, and that it never waits for the GPU.

Counted on a stack of linear layers, after some steps. What one layer launches is the difference
between a stack of eight and one of four; the base's own product is one kernel forward and one
backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import lorakin as lk
from gpu.common import GPU, KernelCount, Stack

pytestmark = [
    pytest.mark.filterwarnings("ignore:delta-lora in place:lorakin.errors.LorakinWarning"),
    pytest.mark.filterwarnings("ignore:lora-drop. importance:lorakin.errors.LorakinWarning"),
]
LAYERS, WIDTH, TOKENS, BEFORE = 4, 64, 128, 4
TOTAL_STEPS = 100
RANKS = {"initial_rank": 8, "target_rank": 4, "start": 2, "finish": 50, "interval": 1}
IMPORTANCE = {f"layers.{n}": 0.8 - 0.1 * n for n in range(2 * LAYERS)}


def adalora() -> lk.AdaLoRA:
    return lk.AdaLoRA(**RANKS, total_steps=TOTAL_STEPS)


METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lk.LoRA(rank=8),
    "lora, dropout": lambda: lk.LoRA(rank=8, dropout=0.1),
    "lora+": lambda: lk.LoRAPlus(rank=8),
    "lora-fa": lambda: lk.LoRAFA(rank=8),
    "lora-fa, corrected": lambda: lk.LoRAFA(rank=8, corrected=True),
    "vera": lambda: lk.VeRA(rank=8),
    "vera, dropout": lambda: lk.VeRA(rank=8, dropout=0.1),
    "dora": lambda: lk.DoRA(rank=8),
    "dora, dropout": lambda: lk.DoRA(rank=8, dropout=0.1),
    "adalora": adalora,
    "lora-drop": lambda: lk.LoRADrop(rank=8, importance=IMPORTANCE, keep=2),
    "delta-lora": lambda: lk.DeltaLoRA(rank=8, start_step=1),
    "delta-lora, in place": lambda: lk.DeltaLoRA(rank=8, start_step=1, update="in_place"),
    "pissa": lambda: lk.PiSSA(rank=8),
    "lora-xs": lambda: lk.LoRAXS(rank=8),
    "adalora, dora": lambda: [lk.DoRA(), adalora()],
    "vera, dora": lambda: [lk.VeRA(rank=8), lk.DoRA()],
    "dora, delta-lora": lambda: [lk.DoRA(rank=8), lk.DeltaLoRA(rank=8, alpha=32.0, start_step=1)],
}


def count_step(
    members: Any,
    dtype: torch.dtype = torch.bfloat16,
    autocast: torch.dtype | None = None,
    bias: bool = False,
    layers: int = LAYERS,
    before: int = BEFORE,
) -> dict[str, KernelCount]:
    """Counts one step of a stack: its forward, its backward and the optimizer's step."""
    model = Stack(layers, WIDTH, bias).to(GPU, dtype)
    adapter = lk.adapt(model, members, "all-linear", seed=0)
    optimizer = adapter.optimizer(lr=1e-3, total_steps=TOTAL_STEPS)
    model.train()
    inputs = torch.randn(TOKENS, WIDTH, device=GPU, dtype=dtype)
    for _ in range(before + 1):
        counts = {phase: KernelCount() for phase in ("forward", "backward", "step")}
        x = inputs.clone().requires_grad_()
        with (
            counts["forward"],
            torch.autocast("cuda", autocast) if autocast else contextlib.nullcontext(),
        ):
            y = model(x)
        gradient = torch.ones_like(y)
        with counts["backward"]:
            y.backward(gradient)
        with counts["step"]:
            optimizer.step()
        optimizer.zero_grad()
    return counts


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, None), (torch.float32, None), (torch.float32, torch.bfloat16)],
    ids=["bfloat16", "float32", "autocast"],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_the_gpu(
    method: str, dtype: torch.dtype, autocast: torch.dtype | None, bias: bool
) -> None:
    counts = count_step(METHODS[method](), dtype, autocast, bias)
    assert [launch for count in counts.values() for launch in count.waits] == []


def kernels_of_a_layer(method: str) -> tuple[float, float]:
    """Returns how many kernels one layer launches in a forward and in a backward, in bfloat16."""
    few, many = (count_step(METHODS[method](), layers=n) for n in (LAYERS, 2 * LAYERS))
    forward, backward = (
        (many[phase].kernels - few[phase].kernels) / LAYERS for phase in ("forward", "backward")
    )
    return forward, backward


CEILINGS = {
    "lora": (3, 5),
    "lora, dropout": (3, 5),
    "lora+": (3, 5),
    "lora-fa": (3, 4),
    "vera": (6, 9),
    "vera, dropout": (6, 12),
    "dora": (10, 11),
    "dora, dropout": (13, 12),
    "adalora": (4, 8),
    "lora-drop": (3, 5),
    "delta-lora": (8, 9),
    "delta-lora, in place": (4, 6),
    "pissa": (8, 7),
    "lora-xs": (4, 5),
}


@pytest.mark.parametrize("method", CEILINGS)
def test_kernels_of_a_layer(method: str) -> None:
    got, most = kernels_of_a_layer(method), CEILINGS[method]
    assert all(g <= m for g, m in zip(got, most, strict=True)), got


@pytest.mark.parametrize(
    ("method", "most"), [("lora", 2), ("lora+", 4), ("dora", 4), ("adalora", 29)]
)
def test_kernels_of_the_optimizers_step(method: str, most: int) -> None:
    assert count_step(METHODS[method]())["step"].kernels <= most


def table(methods: Sequence[str] = tuple(METHODS)) -> str:
    """Returns the counts of all methods as a Markdown table."""
    rows = [
        "| method | a layer, forward | backward | waits | step of 4 layers | its waits |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        forward, backward = kernels_of_a_layer(method)
        counts = count_step(METHODS[method]())
        waits = len(counts["forward"].waits) + len(counts["backward"].waits)
        step = counts["step"]
        rows.append(
            f"| {method} | {forward:g} | {backward:g} | {waits} | {step.kernels} | "
            f"{len(step.waits)} |"
        )
    return "\n".join(rows)
