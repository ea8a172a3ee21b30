"""Measures adapters on experts: forward and backward of one layer's experts over the frozen base's.

    python -m benchmarks.experts [--rounds 7] [--device cuda] [--quick]

Compares LoRA, LoRA-FA and DoRA of lorakin with LoRA of PEFT (`target_parameters`), all of rank 16
on gate_up_proj and down_proj, interleaved in one process. Also counts the bytes that autograd
keeps for the backward. Routing is random and the same for all.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import lorakin as lk
from benchmarks.measure import interleaved, ratio, saved_bytes

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
MEMBERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lk.LoRA(rank=16),
    "lora-fa": lambda: lk.LoRAFA(rank=16),
    "dora": lambda: lk.DoRA(rank=16),
}


class Shape(NamedTuple):
    """The experts of a layer, and how many of them each token goes to (`chosen`)."""

    experts: int
    hidden: int
    intermediate: int
    chosen: int
    tokens: int


SHAPES = (Shape(8, 1024, 1792, 2, 512), Shape(64, 1024, 256, 8, 512), Shape(128, 512, 192, 8, 256))
QUICK = (Shape(4, 64, 32, 2, 16),)


class Layer(nn.Module):
    """Mixtral's experts with a fixed routing."""

    def __init__(self, shape: Shape, kernel: str, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_local_experts=shape.experts,
        )
        config._experts_implementation = kernel
        self.experts = MixtralExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.to(device, dtype).requires_grad_(False)
        draws = [torch.randperm(shape.experts)[: shape.chosen] for _ in range(shape.tokens)]
        self.routes = torch.stack(draws).to(device)
        self.shares = torch.full_like(self.routes, 1 / shape.chosen, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts(x, self.routes, self.shares)
        return out.float().square().sum()


def variants(base: Layer) -> dict[str, nn.Module]:
    """Returns the base, and copies of it with each adapter."""
    found: dict[str, nn.Module] = {"base": base}
    for word, member in MEMBERS.items():
        found[word] = copy.deepcopy(base)
        lk.adapt(found[word], member(), targets=STACKS)
    found["PEFT lora"] = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=16, target_modules=[], target_parameters=STACKS)
    )
    return found


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Returns a function that runs forward and backward."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        model(x.detach().requires_grad_()).backward()
        for parameter in trained:
            parameter.grad = None

    return step


def measured(shape: Shape, kernel: str, dtype: torch.dtype, rounds: int, device: str) -> list[str]:
    """Returns a cell for each variant but the base: time and bytes kept, over the base's."""
    base = Layer(shape, kernel, dtype, device)
    models, x = variants(base), torch.randn(shape.tokens, shape.hidden, dtype=dtype, device=device)
    seconds = interleaved(
        {name: step_of(model, x) for name, model in models.items()}, rounds, device
    )
    clock = seconds["thread" if device == "cpu" else "wall"]
    kept = {
        name: saved_bytes(model, lambda: model(x.detach().requires_grad_()))  # noqa: B023
        for name, model in models.items()
    }
    return [
        f"{ratio(clock, name, 'base')}\nkept {kept[name] / kept['base']:.1f}"
        for name in models
        if name != "base"
    ]


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table = Table(
        "experts",
        "kernel",
        "dtype",
        *MEMBERS,
        "PEFT lora",
        title="Forward and backward over the frozen base's",
    )
    for shape in QUICK if arguments.quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for kernel in ("eager", "grouped_mm"):
                cells = measured(
                    shape,
                    kernel,
                    dtype,
                    2 if arguments.quick else arguments.rounds,
                    arguments.device,
                )
                words = (
                    f"{shape.experts} of {shape.hidden} × {shape.intermediate}, "
                    f"{shape.tokens} tokens to {shape.chosen}"
                )
                table.add_row(words, kernel, str(dtype).removeprefix("torch."), *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
