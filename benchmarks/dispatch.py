"""Times a call without arithmetic: one token through one small adapted layer, over PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.measure import interleaved, ratio
from benchmarks.subjects import SUBJECTS, ours, theirs

CALLS = 200


class One(nn.Module):
    """A model of one layer, which has a name that all subjects target."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, 64)."""
        out: torch.Tensor = self.q_proj(x)
        return out


def measure(
    names: Sequence[str], dtype: torch.dtype, rounds: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Returns a row for each member: lorakin's time over PEFT's.

    `step` is forward and backward; `forward` has no gradients and runs in eval mode.
    """
    base = One().to(device, dtype).requires_grad_(False)
    x, table = torch.randn(1, 64, device=device).to(dtype), []
    for name in (name for name in names if SUBJECTS[name].theirs is not None):
        models = {
            "lorakin": ours(base, SUBJECTS[name], ["q_proj"])[0],
            "PEFT": theirs(base, SUBJECTS[name]),
        }
        row: dict[str, Any] = {"member": name}
        for kind, make in (("step", _step), ("forward", _forward)):
            seconds = interleaved(
                {key: make(model, x) for key, model in models.items()}, rounds, device
            )
            row[kind] = ratio(seconds["thread" if device == "cpu" else "wall"], "lorakin", "PEFT")
        table.append(row)
        print(f"{name}, one token × PEFT: step {row['step']}, forward {row['forward']}", flush=True)
    return table


def _step(model: Any, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            model(x.detach().requires_grad_()).sum().backward()

    return run


def _forward(model: Any, x: torch.Tensor) -> Callable[[], None]:
    model.eval().requires_grad_(False)

    def run() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                model(x)

    return run
