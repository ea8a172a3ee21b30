"""Times what surrounds the steps: optimizer, adapting, files, merging, AdaLoRA's allocator."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch

import lorakin as lk
from benchmarks.measure import interleaved, ratio
from benchmarks.subjects import LINEARS, SUBJECTS, Decoder, decoder, ours, theirs, twin

Pairs = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]


def measure(
    shape: dict[str, int], layers: int, dtype: torch.dtype, rounds: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Returns a row for each chore: lorakin's time over PEFT's, by clock."""
    base = decoder(shape, dtype, device, layers)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (mine, other) in _chores(base, Path(folder)).items():
            seconds = interleaved({"lorakin": mine, "peft": other}, rounds, device)
            table.append(
                {
                    "chore": name,
                    **{clock: ratio(seconds[clock], "lorakin", "peft") for clock in seconds},
                }
            )
            print(name, table[-1]["thread"], "wall", table[-1]["wall"], flush=True)
    return table


def _chores(base: Decoder, folder: Path) -> Pairs:
    lora = SUBJECTS["lora"]
    (mine, adapter), other = ours(base, lora), theirs(base, lora)
    adapter.save(folder / "lorakin")
    other.save_pretrained(folder / "peft")
    fresh, bare = twin(base), twin(base)

    def inject() -> None:
        lk.adapt(fresh, lora.ours(), LINEARS).remove()

    def load() -> None:
        lk.load(fresh, folder / "lorakin").remove()

    def peft_load() -> None:
        peft.PeftModel.from_pretrained(bare, folder / "peft").unload()

    def merge() -> None:
        adapter.merge()
        adapter.unmerge()

    def peft_merge() -> None:
        other.merge_adapter()
        other.unmerge_adapter()

    return {
        f"optimizer step, {len(adapter.parameters())} tensors": (
            _stepping(mine, adapter.optimizer(lr=1e-4)),
            _stepping(other),
        ),
        "put adapters in": (inject, lambda: peft.get_peft_model(bare, lora.theirs()).unload()),
        "load": (load, peft_load),
        "save": (
            lambda: adapter.save(folder / "lorakin"),
            lambda: other.save_pretrained(folder / "peft"),
        ),
        "merge and unmerge": (merge, peft_merge),
        **_allocation(base),
    }


def _stepping(model: Any, optimizer: torch.optim.Optimizer | None = None) -> Callable[[], Any]:
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    return (optimizer or torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)).step


def _allocation(base: Decoder) -> Pairs:
    subject = SUBJECTS["adalora"]
    (mine, adapter), other = ours(base, subject), theirs(base, subject)
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.0, total_steps=10_000)
    for model in (mine, other):
        _stepping(model)
    steps = iter(range(1, 10_000))

    def regulariser() -> None:
        loss = torch.zeros(())
        for name, parameter in other.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                square = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
                loss = loss + torch.norm(
                    square - torch.eye(*square.shape, out=torch.empty_like(square)), p="fro"
                )
        loss.backward()

    (rule,) = adapter.run.rules or ()
    return {
        "adalora: allocator": (
            lambda: (rule.update_scores(), rule.after(next(steps), optimizer)),
            lambda: other.base_model.update_and_allocate(next(steps)),
        ),
        "adalora: regulariser": (rule.regularise, regulariser),
    }
