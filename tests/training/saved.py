"""What a run leaves: the tensors of its adapter, and a prepared run with what it printed."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from lorakin.training import train as training
from lorakin.training.recipe import Recipe


def tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of the adapter in a directory."""
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(one: str | Path, other: str | Path) -> bool:
    """Returns whether two directories hold the same adapter, bit for bit."""
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def prepared(recipe: Recipe, resume: bool = False) -> tuple[training.PreparedRun, str]:
    """Returns a run that is ready to train, and what was printed on the way."""
    shown = io.StringIO()
    run = training.prepare(recipe, Console(file=shown, width=200), resume)
    return run, shown.getvalue()
