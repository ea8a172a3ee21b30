"""Measures how much of an adapter survives when the merged weight is quantised again.

    python -m benchmarks.requantise [--steps 30]

LoRA is trained on quantised SmolLM2, on functions and their docstrings. With V = W + ΔW for each
adapted weight W, and Q the quantisation, the table shows the share of ΔW that is left,
⟨Q(V) − Q(W), ΔW⟩ / ‖ΔW‖², and the error, ‖Q(V) − V‖ / ‖ΔW‖. Then it shows the held-out loss of the
base, of the base with the adapter, and of the model that was merged and rounded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lorakin.inject.adapted import module_at
from lorakin.inject.attachments import attachments_of
from lorakin.inject.layer_kinds import QuantisedLayer
from lorakin.training import train as training
from lorakin.training.docstrings import docstring_rows
from lorakin.training.recipe import Recipe


def four_bits(weight: Tensor) -> Tensor:
    """Returns the weight rounded to NF4 with nested scales."""
    from bitsandbytes import functional

    bits, state = functional.quantize_4bit(
        weight.contiguous(), quant_type="nf4", compress_statistics=True
    )
    rounded: Tensor = functional.dequantize_4bit(bits, state)
    return rounded.float()


def eight_bits(weight: Tensor) -> Tensor:
    """Returns the weight rounded to eight bits with a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"nf4": four_bits, "int8": eight_bits}


def measured(word: str, steps: int, folder: Path) -> list[str]:
    """Returns one row of the table."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in docstring_rows(max_code=200)[:400]))
    recipe = Recipe(
        "smollm2",
        str(data),
        str(folder / word),
        quantize=word,
        steps=steps,
        batch_size=8,
        max_length=128,
        lr=1e-3,
        save_every=0,
    )
    run = training.prepare(recipe, Console(quiet=True))
    result = training.train(run)
    left, error = [], []
    for path in run.adapter.placement.methods:
        module: Any = module_at(run.loaded.model, path)
        weight, change = (
            run.adapter.tensors.base_weight(path),
            run.adapter.tensors.saved_change(path),
        )
        merged = change.applied_to(weight).detach()
        moved, rounded = merged - weight, ROUNDINGS[word](merged)
        size = float(moved.square().sum())
        left.append(float(((rounded - ROUNDINGS[word](weight)) * moved).sum()) / size)
        error.append(float((rounded - merged).norm()) / size**0.5)
        attachments_of(module).dense = rounded.to(
            next(run.loaded.model.parameters()).dtype
        )  # as a merge would leave it, but rounded
        attachments_of(module).merged = (run.adapter.name,)
        assert QuantisedLayer.shape(module)[:2] == rounded.shape
    with torch.no_grad():
        again = run.evaluate()
    losses = f"{result.before.loss:.3f} / {result.after.loss:.3f} / {again.loss:.3f}"
    return [word, f"{statistics.median(left):.0%}", f"{statistics.median(error):.1f}", losses]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    table = Table(
        "base",
        "of ΔW survives (median)",
        "rounding error / ΔW (median)",
        "held-out loss: base / adapter / merged, rounded",
    )
    with tempfile.TemporaryDirectory() as folder:
        for word in ROUNDINGS:
            table.add_row(*measured(word, options.steps, Path(folder)))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
