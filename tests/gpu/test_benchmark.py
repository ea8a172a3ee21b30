"""`make gpu` on a tiny shape: figures of every kind, and cells that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu_cells
from benchmarks.gpu_cells import Cell, Worker
from benchmarks.gpu_plans import plan_until_measured
from benchmarks.gpu_results import Results

from gpu.graphs import IS_PRETENDED

STEPS = [
    Cell("tiny", "bfloat16", "lora"),
    Cell("tiny", "bfloat16", "PEFT narrow, lora"),
    Cell("tiny", "bfloat16", "adalora"),
    Cell("tiny", "bfloat16", "PEFT, adalora"),
]
FUSED = [
    Cell("tiny", "bfloat16", "lora, `lk.fuse`"),
    Cell("tiny", "bfloat16", "frozen base, `lk.fuse`"),
]
OTHERS = [
    Cell("tiny", "float16", "lora, GradScaler"),
    Cell("", "lorakin train", "lora"),
    Cell("tiny", "bfloat16", "no such subject"),
    Cell("tiny", "bfloat16", "PEFT, dora"),
]


def test_every_kind_of_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gpu_cells.theirs

    def theirs(base: Any, subject: Any, narrow: bool = False) -> Any:
        if subject.name == "dora":
            raise torch.OutOfMemoryError
        return plain(base, subject, narrow)

    monkeypatch.setattr(gpu_cells, "theirs", theirs)
    results = Results(tmp_path, {})
    # Triton's interpreter takes seconds for a step.
    steps = STEPS if IS_PRETENDED else [*STEPS, *FUSED]
    results.plan([*steps, *OTHERS])
    assert Worker(results, rounds=2, pretended=IS_PRETENDED).work()
    results.data["measured"] = True
    results.write()
    plan_until_measured(tmp_path)
    results.write()

    entries = {tuple(entry["cell"]): entry for entry in Results.read(tmp_path).entries}
    for cell in (*steps, OTHERS[0]):
        entry = entries[cell]
        assert "failed" not in entry, entry
        median, low, high = entry["ratio"]
        assert 0 < low <= median <= high
        assert entry["peak"] > 0
        planned = results.plans.get(Results.key(entry))
        assert (planned is None) == cell.subject.startswith(("PEFT", "frozen"))
        if planned is not None:
            # The pretended GPU keeps attention's weights, which a plan knows no GPU keeps.
            assert 0.85 < planned / entry["peak"] < 1.15
    assert entries[OTHERS[1]]["tokens a second"][1] > 0
    assert entries[OTHERS[2]]["failed"] == "KeyError: 'no such subject'"
    assert entries[OTHERS[3]]["failed"] == "out of memory"
    text = (tmp_path / "results.md").read_text()
    assert "| PEFT, dora | out of memory | –" in text
    assert "Not measured" not in text
