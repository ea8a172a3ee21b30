"""A batch of 16 requests for 8 adapters: lorakin's mixed batch, PEFT's, and the base alone, interleaved in one process.

    python benchmarks/mixed_batch.py [--layers 12] [--rounds 9] [--dtype bfloat16]

The shape is SmolLM2-135M's decoder (hidden 576), all seven linear layers adapted at rank 16, random weights. Time is that of
one thread (`time.thread_time`), the order reversed every other round, the median of all rounds but the first.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers

import lorakin as lk

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS, ROWS, RANK = 8, 16, 16
NAMES: list[str | None] = [f"a{row % ADAPTERS}" for row in range(ROWS)]


def decoder(layers: int, dtype: torch.dtype) -> Any:
    """SmolLM2's shape without its head."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=4096, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config).to(dtype).eval()


def measured(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one thread, for each call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            started = time.thread_time()
            calls[name]()
            seconds[name].append(time.thread_time() - started)
    return {name: one[1:] for name, one in seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = decoder(arguments.layers, getattr(torch, arguments.dtype))
    ours = copy.deepcopy(base)
    for name in sorted(set(NAMES), key=str):
        adapter = lk.adapt(ours, lk.LoRA(RANK, 32), targets=TARGETS, name=str(name))
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.requires_grad_(False)
    config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
    for number in range(1, ADAPTERS):
        theirs.add_adapter(f"a{number}", config)
    theirs.eval()
    versions = f"{platform.machine()}, torch {torch.__version__}, peft {peft.__version__}"
    print(f"{versions}, {arguments.dtype}, {arguments.layers} layers\n")
    print("| tokens a row | × PEFT | × base alone | PEFT × base alone |\n|---|---|---|---|")
    with torch.no_grad(), lk.mixed_batch(ours, NAMES):
        for tokens in (1, 32, 128):
            ids = torch.randint(0, 4096, (ROWS, tokens))
            calls: dict[str, Callable[[], Any]] = {
                "ours": lambda i=ids: ours(i),  # type: ignore[misc]
                "theirs": lambda i=ids: theirs(input_ids=i, adapter_names=NAMES),  # type: ignore[misc]
                "base": lambda i=ids: base(i),  # type: ignore[misc]
            }
            seconds = measured(calls, arguments.rounds)
            cells = []
            for over, under in (("ours", "theirs"), ("ours", "base"), ("theirs", "base")):
                ratios = [one / other for one, other in zip(seconds[over], seconds[under], strict=True)]
                cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
            print(f"| {tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
