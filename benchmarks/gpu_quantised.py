"""An NF4 linear layer: kernels, waits and bytes on a pretended GPU beside PEFT's QLoRA, and times.

    python -m benchmarks.gpu_quantised           kernels, waits and bytes; no GPU
    python -m benchmarks.gpu_quantised cpu       a step's time on this CPU, in turns

The layer is bitsandbytes' Linear4bit: NF4, nested scales, bfloat16. **Plain** is lorakin with the
library's own forward, and plain operations beside it, as it is where no kernel applies. **PEFT**
keeps the adapter in float32, its default; **PEFT narrow** in bfloat16. LoRA-FA is PEFT's LoRA with
A frozen. Bytes are what autograd keeps for the backward of one layer, for each token, each storage
once.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
if "cpu" not in sys.argv[1:]:
    import gpu.pretended  # noqa: F401 - before torch
import peft
import torch
from torch import Tensor

import lorakin as lk
from benchmarks.measure import interleaved, ratio, saved_bytes
from gpu.test_kernels import METHODS
from gpu.test_quantised import CEILINGS, QuantisedStack, count, inputs
from lorakin.inject import quantised_products

WIDTH, RANK, LAYERS, TOKENS = 256, 8, 2, 2048
PEFT: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=RANK),
    "lora, dropout": lambda: peft.LoraConfig(r=RANK, lora_dropout=0.1),
    "lora-fa": lambda: peft.LoraConfig(r=RANK),
    "vera": lambda: peft.VeraConfig(r=RANK, vera_dropout=0.0),
    "vera, dropout": lambda: peft.VeraConfig(r=RANK, vera_dropout=0.1),
    "dora": lambda: peft.LoraConfig(r=RANK, use_dora=True),
    "dora, dropout": lambda: peft.LoraConfig(r=RANK, use_dora=True, lora_dropout=0.1),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=RANK, target_r=RANK // 2, total_step=100, tinit=2, tfinal=50
    ),
}
SUBJECTS = ("lorakin", "plain", "PEFT", "PEFT narrow")


class Cost(NamedTuple):
    """What one layer costs."""

    forward: float
    backward: float
    waits: float
    bytes_per_token: float

    def __str__(self) -> str:
        return f"{self.forward:g} + {self.backward:g} · {self.bytes_per_token:g} B"


def subject(kind: str, method: str, layers: int, width: int = WIDTH, device: str = "cuda") -> Any:
    """Returns a stack with an adapter of `kind`, one of `SUBJECTS`, ready to train."""
    stack = QuantisedStack(layers, width).to(device)
    if not kind.startswith("PEFT"):
        lk.adapt(stack, METHODS[method](), "all-linear", seed=0)
        return stack.train()
    config = PEFT[method]()
    config.target_modules = [f"layers.{n}" for n in range(layers)]
    wrapped = peft.get_peft_model(stack, config).train()
    for name, tensor in [*wrapped.named_parameters(), *wrapped.named_buffers()]:
        if method == "lora-fa" and "lora_A" in name:
            tensor.requires_grad_(False)
        if kind == "PEFT narrow" and tensor.dtype == torch.float32 and tensor.dim():
            tensor.data = tensor.data.bfloat16()
    return wrapped.base_model.model


def running(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which a subject of `kind` runs."""
    if kind != "plain":
        return contextlib.nullcontext()
    return mock.patch.object(quantised_products, "weight_source", return_value=None)


def cost(kind: str, method: str) -> Cost:
    """Counts one layer: the difference between a stack and one of twice the layers."""
    totals = []
    for layers in (LAYERS, 2 * LAYERS):
        model = subject(kind, method, layers)
        with running(kind):
            forward, backward = count(model, inputs(TOKENS, WIDTH))
            kept = [
                saved_bytes(model, partial(model, inputs(tokens, WIDTH).requires_grad_()))
                for tokens in (TOKENS, 2 * TOKENS)
            ]
        waits = len(forward.waits) + len(backward.waits)
        totals.append((forward.kernels, backward.kernels, waits, (kept[1] - kept[0]) / TOKENS))
    return Cost(*((many - few) / LAYERS for few, many in zip(*totals, strict=True)))


def on_gpu() -> Iterator[str]:
    """Yields the lines of the table: kernels forward + backward · bytes per token, and waits."""
    yield f"| method | {' | '.join(SUBJECTS)} | waits of each |"
    yield f"|{'---|' * (2 + len(SUBJECTS))}"
    for method in CEILINGS:
        costs = [cost(kind, method) for kind in SUBJECTS]
        waits = " / ".join(f"{of_kind.waits:g}" for of_kind in costs)
        yield f"| {method} | {' | '.join(map(str, costs))} | {waits} |"


def on_cpu(rounds: int = 15, width: int = 1024, tokens: int = 512) -> Iterator[str]:
    """Yields the lines of a table of times of forward and backward: medians (least–most)."""
    yield "| method | lorakin / plain | lorakin / PEFT |"
    yield "|---|---|---|"
    for method in CEILINGS:
        calls = {}
        for kind in SUBJECTS[:3]:
            model = subject(kind, method, LAYERS, width, "cpu")
            x = inputs(tokens, width, "cpu").requires_grad_()

            def step(model: Any = model, x: Tensor = x, kind: str = kind) -> None:
                with running(kind):
                    model(x).float().square().mean().backward()

            calls[kind] = step
        seconds = interleaved(calls, rounds)["thread"]
        cells = [str(ratio(seconds, "lorakin", kind)) for kind in SUBJECTS[1:3]]
        yield f"| {method} | {' | '.join(cells)} |"


def main() -> None:
    """Prints the table that was asked for."""
    warnings.simplefilter("ignore")
    asked = sys.argv[1:] or ["gpu"]
    if asked not in (["gpu"], ["cpu"]):
        raise SystemExit(f"no table {asked[0]!r}; there are gpu and cpu")
    for line in on_cpu() if asked == ["cpu"] else on_gpu():
        print(line, flush=True)


if __name__ == "__main__":
    main()
