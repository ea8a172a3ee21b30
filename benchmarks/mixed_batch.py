"""Times the forward of a batch whose requests use different adapters: lorakin, PEFT, base alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
import transformers

import lorakin as lk
from benchmarks.measure import interleaved, ratio
from benchmarks.subjects import LINEARS, SHAPES, config, lora_config


def measure(
    layers: int,
    dtype: torch.dtype,
    rounds: int,
    tokens: Sequence[int] = (1, 32, 128),
    adapters: int = 8,
    requests: int = 16,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Returns a row for each length of a request. SmolLM2's shape, rank 16."""
    base = _decoder(layers, dtype, device)
    names: list[str | None] = [f"a{row % adapters}" for row in range(requests)]
    ours, theirs = _ours(base, adapters), _theirs(base, adapters)
    table = []
    with torch.no_grad(), lk.mixed_batch(ours, names):
        for count in tokens:
            ids = torch.randint(0, 4096, (requests, count), device=device)
            calls: dict[str, Callable[[], Any]] = {
                "ours": lambda i=ids: ours(i),  # type: ignore[misc]
                "theirs": lambda i=ids: theirs(input_ids=i, adapter_names=names),  # type: ignore[misc]
                "base": lambda i=ids: base(i),  # type: ignore[misc]
            }
            seconds = interleaved(calls, rounds, device)["thread" if device == "cpu" else "wall"]
            table.append(
                {
                    "tokens": count,
                    "over PEFT": ratio(seconds, "ours", "theirs"),
                    "over base": ratio(seconds, "ours", "base"),
                    "PEFT over base": ratio(seconds, "theirs", "base"),
                }
            )
            print(
                adapters,
                "adapters,",
                count,
                "tokens:",
                table[-1]["over PEFT"],
                "× PEFT",
                flush=True,
            )
    return table


def _decoder(layers: int, dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaModel(config(SHAPES["S"], layers, 4096)).to(device, dtype).eval()


def _ours(base: Any, adapters: int) -> Any:
    model = copy.deepcopy(base)
    for number in range(adapters):
        adapter = lk.adapt(model, lk.LoRA(16, 32), targets=LINEARS, name=f"a{number}")
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.requires_grad_(False)
    return model


def _theirs(base: Any, adapters: int) -> Any:
    lora = lora_config()()
    model = peft.get_peft_model(copy.deepcopy(base), lora, adapter_name="a0")
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", lora)
    return model.eval()
