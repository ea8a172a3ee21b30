"""NF4 layers on a GPU: every member's gradients are those of the CPU, with few kernels and no wait.

On a pretended GPU bitsandbytes' operators run as torch's operations; each counts as what its CUDA
library launches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakin as lk
from gpu.common import CPU, GPU, SINGLE, STARTS, KernelCount, members, moved_from_start
from gpu.test_kernels import LAYERS, METHODS, TOTAL_STEPS

bnb = pytest.importorskip("bitsandbytes")
WIDTH, TOKENS = 64, 2048
BY_MEMBER = [words for words in SINGLE if words[0] not in (*STARTS, "lora-drop")]


class QuantisedStack(nn.Module):
    """NF4 layers with nested scales, which compute in `dtype`, one after another."""

    is_loaded_in_4bit = True  # PEFT asks for it

    def __init__(
        self,
        layers: int,
        width: int = WIDTH,
        dtype: torch.dtype = torch.bfloat16,
        bias: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nf4(nn.Linear(width, width, bias).to(dtype)) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def nf4(linear: nn.Linear) -> Any:
    """Returns a layer quantised as QLoRA does, on the CPU."""
    packed = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
    )
    packed.load_state_dict(linear.state_dict())
    return packed.to("cpu").requires_grad_(False)


def count(
    model: Any, inputs: Tensor, before: int = 1, optimizer: Any = None
) -> tuple[KernelCount, KernelCount]:
    """Counts a forward and a backward, after some before."""
    counts = KernelCount(), KernelCount()
    for _ in range(before + 1):
        counts = KernelCount(), KernelCount()
        x = inputs.clone().requires_grad_()
        with counts[0]:
            y = model(x)
        gradient = torch.ones_like(y)
        with counts[1]:
            y.backward(gradient)
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()
    return counts


def inputs(tokens: int = TOKENS, width: int = WIDTH, device: Any = GPU) -> Tensor:
    return torch.randn(tokens, width, device=device, dtype=torch.bfloat16)


def counted(
    members: Callable[[], Any], layers: int, before: int = 1, bias: bool = False
) -> tuple[KernelCount, KernelCount]:
    model = QuantisedStack(layers, bias=bias).to(GPU)
    adapter = lk.adapt(model, members(), "all-linear", seed=0)
    optimizer = adapter.optimizer(lr=1e-3, total_steps=TOTAL_STEPS)
    return count(model.train(), inputs(), before, optimizer)


CEILINGS = {
    "lora": (6, 8),
    "lora, dropout": (6, 9),
    "lora-fa": (6, 7),
    "vera": (8, 11),
    "vera, dropout": (9, 14),
    "dora": (13, 14),
    "dora, dropout": (16, 16),
    "adalora": (7, 11),
}
"""The library's own layer launches 4 + 4: scales (2), the weight, the product."""


@pytest.mark.parametrize("method", CEILINGS)
def test_kernels_of_a_quantised_layer(method: str) -> None:
    few, many = (counted(METHODS[method], layers) for layers in (LAYERS, 2 * LAYERS))
    got = [(b.kernels - a.kernels) / LAYERS for a, b in zip(few, many, strict=True)]
    assert all(g <= most for g, most in zip(got, CEILINGS[method], strict=True)), got


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("method", CEILINGS)
def test_a_step_never_waits_and_can_be_captured(method: str, bias: bool) -> None:
    steps = [counted(METHODS[method], LAYERS, before, bias) for before in (4, 5)]
    for first, second in zip(*steps, strict=True):
        assert not first.waits
        assert not second.waits
        once, again = (
            [(launch.name, launch.shapes) for launch in phase.launches] for phase in (first, second)
        )
        assert once == again


@pytest.mark.parametrize("words", BY_MEMBER, ids="+".join)
def test_gradients_are_those_of_the_cpu(words: tuple[str, ...]) -> None:
    gradients = []
    x = torch.randn(90, WIDTH, generator=torch.Generator().manual_seed(2))
    base = QuantisedStack(2, dtype=torch.float32, bias=True)
    for device in (CPU, GPU):
        model = copy.deepcopy(base).to(device)
        adapter = lk.adapt(model, members(words), "all-linear", seed=0)
        moved_from_start(adapter)
        model.train()(x.to(device)).square().sum().backward()
        gradients.append([p.grad.cpu() for p in adapter.parameters() if p.grad is not None])
    assert gradients[0]
    for on_cpu, on_gpu in zip(*gradients, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)
