"""Measures how time and memory grow with rank, width, length, depth and number of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

import lorakin as lk
from benchmarks import mixed_batch
from benchmarks.measure import interleaved, ratio, saved_bytes
from benchmarks.steps import forward_of, step_of
from benchmarks.subjects import LINEARS, Subject, batch, decoder, lora_config, ours, theirs

matplotlib.use("Agg")
from matplotlib import pyplot as plt

AXES: dict[str, tuple[int, ...]] = {
    "rank": (1, 4, 16, 64, 256, 512),
    "width": (256, 512, 1024, 2048, 4096),
    "sequence": (64, 256, 1024, 4096),
    "depth": (1, 2, 4, 8, 16),
    "adapters": (1, 2, 4, 8, 16, 32, 64),
}
LABELS = {
    "rank": "rank",
    "width": "hidden size",
    "sequence": "tokens a row",
    "depth": "layers",
    "adapters": "adapters in a batch",
}


def measure(
    dtype: torch.dtype, rounds: int, device: str = "cpu", points: int | None = None
) -> list[dict[str, Any]]:
    """Returns a row for each point: a LoRA step's time and saved bytes over the frozen base's.

    `arithmetic` is the ratio of multiplications. On the axis `adapters` the forward of a mixed
    batch is measured instead, over the base's forward.
    """
    table = []
    for axis, values in AXES.items():
        for value in values[:points]:
            row = (
                _adapters(value, dtype, rounds)
                if axis == "adapters"
                else _step(axis, value, dtype, rounds, device)
            )
            table.append({"axis": axis, "value": value, **row})
            print(axis, value, {key: str(figure) for key, figure in row.items()}, flush=True)
    return table


def _step(axis: str, value: int, dtype: torch.dtype, rounds: int, device: str) -> dict[str, Any]:
    width = value if axis == "width" else 512
    shape = {
        "hidden_size": width,
        "intermediate_size": width * 8 // 3 // 64 * 64,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
    }
    rank, layers = (
        value if axis == name else usual for name, usual in (("rank", 16), ("depth", 1))
    )
    base = decoder(shape, dtype, device, layers)
    inputs = batch(base, 1, value if axis == "sequence" else 256)
    subject = Subject("lora", lambda: lk.LoRA(rank, 2 * rank), lora_config(rank))
    models = {"frozen": base, "lorakin": ours(base, subject)[0], "PEFT": theirs(base, subject)}
    clock = interleaved(
        {name: step_of(model, inputs) for name, model in models.items()}, rounds, device
    )
    seconds = clock["thread" if device == "cpu" else "wall"]
    kept = {name: saved_bytes(model, forward_of(model, inputs)) for name, model in models.items()}
    linears = [
        module for name, module in base.named_modules() if name.rpartition(".")[2] in LINEARS
    ]
    product = sum(4 * m.in_features * m.out_features for m in linears)
    pair = sum(6 * rank * (m.in_features + m.out_features) for m in linears)
    return {
        "lorakin": ratio(seconds, "lorakin", "frozen"),
        "PEFT": ratio(seconds, "PEFT", "frozen"),
        "arithmetic": 1 + pair / product,
        "lorakin saved": kept["lorakin"] / kept["frozen"],
        "PEFT saved": kept["PEFT"] / kept["frozen"],
        "frozen seconds": sorted(seconds["frozen"])[len(seconds["frozen"]) // 2],
    }


def _adapters(count: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    (row,) = mixed_batch.measure(2, dtype, rounds, tokens=(32,), adapters=count, requests=64)
    return {"lorakin": row["over base"], "PEFT": row["PEFT over base"]}


def plot(table: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots time above and saved bytes below, with a column for each axis."""
    figure, panels = plt.subplots(2, len(AXES), figsize=(3.2 * len(AXES), 5.6), sharey="row")
    for column, axis in enumerate(AXES):
        rows = [row for row in table if row["axis"] == axis]
        values = [row["value"] for row in rows]
        above, below = panels[:, column]
        for name, colour in (("lorakin", "#0a7d55"), ("PEFT", "#b4541e")):
            spreads = [row[name] for row in rows]
            middle, low, high = ([spread[i] for spread in spreads] for i in range(3))
            above.plot(values, middle, "o-", color=colour, label=name)
            above.fill_between(values, low, high, color=colour, alpha=0.15)
            if axis != "adapters":
                below.plot(
                    values, [row[f"{name} saved"] for row in rows], "o-", color=colour, label=name
                )
        if axis != "adapters":
            above.plot(
                values,
                [row["arithmetic"] for row in rows],
                ":",
                color="#555555",
                label="arithmetic of the linears",
            )
        for panel in (above, below):
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3)
        above.axhline(1, color="#999999", lw=0.8)
        below.set_xlabel(LABELS[axis])
    panels[1, -1].set_axis_off()
    panels[0, -1].set_xlabel(LABELS["adapters"])
    panels[0, 0].set_ylabel("time, × frozen base")
    panels[1, 0].set_ylabel("saved bytes, × frozen base")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
