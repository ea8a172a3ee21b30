"""The benchmark runs and gives ratios; what they are is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import gpu, gpu_cells, gpu_results
from benchmarks.__main__ import main

ROOT = Path(__file__).parent.parent


def test_the_quick_form_measures_every_part(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path)]
    members = ["--members", "lora,dora,vera"]
    done = subprocess.run([*command, *members], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    steps = results["steps"]["S bfloat16"]
    assert {(row["member"], row["variant"]) for row in steps} >= {
        (member, variant)
        for member in ("lora", "dora", "vera")
        for variant in ("lorakin", "PEFT", "PEFT narrow")
    }
    assert {row["variant"] for row in steps} >= {"lorakin fused", "full fine-tuning"}
    for row in (*steps, *results["whole"]["bfloat16"], *results["chores"]):
        for clock in ("thread", "wall"):
            median, low, high = row[clock]
            assert 0 < low <= median <= high
    assert all(row["saved"] > 0 for row in steps)
    assert all(mib > 0 for mib in results["peak"]["bfloat16"].values())
    assert [row["tokens"] for row in results["serving"]] == [1, 32, 128]
    assert {row["axis"] for row in results["scaling"]} == {
        "rank",
        "width",
        "sequence",
        "depth",
        "adapters",
    }
    assert all(0 < row["error"] < 1 for row in results["accuracy"]["S bfloat16"])
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    text = (tmp_path / "results.md").read_text()
    assert "| lora | lorakin |" in text
    assert results["machine"]["versions"]["torch"] in text


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--members", "lorra"], "'lorra'"), (["steppes"], "'steppes'")]
)
def test_what_is_unknown_is_named_before_anything_runs(
    tmp_path: Path,
    arguments: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_worker_that_dies_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kills its process in its second cell; the time ends in the fourth worker."""
    runs = []

    def worker(command: list[str], seconds: float, without_gpu: bool = False) -> int | None:
        results = gpu_results.Results.read(tmp_path)
        if "--planner" in command:
            results.add_plan({"cell": ["8B", "bfloat16", "6"], "rows": 4}, 3)
            return 0
        runs.append(command)
        results.plan([("8B", "bfloat16", f"{n}") for n in range(8)])
        entry = results.begin_next()
        assert entry is not None
        figures = {"rows": 4, "length": 2048, "ratio": (2.0, 1.0, 3.0), "ms": (1.0, 1.0, 1.0)}
        results.finish(entry, figures | {"frozen ms": (1, 1, 1), "peak": 4}, 1.0)
        results.begin_next()
        return None if len(runs) == 4 else -11

    monkeypatch.setattr(gpu, "run_for", worker)
    assert gpu.main(["8B", "--no-tests", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "process died" in line] == [
        f"| {n} | its process died | – | – | – | – | – | – |" for n in (1, 3, 5)
    ]
    assert "| 6 | 1.0 (1.0–1.0) | 2.00 (1.00–3.00) | – | – | 0 | 0 | 0.75 |" in lines
    assert lines[-2] == "Not measured: the time was over. 8B bfloat16: 7"


def test_the_gpus_table_says_how_wrong_the_estimate_is() -> None:
    known = gpu_results.estimates(gpu_results.ESTIMATES.read_text(encoding="utf-8"))
    assert set(known) == {"8B", "135M"}
    subjects = {cell.subject for cell in gpu_cells.cells(["135M", "8B"], 80)}
    assert set(known["8B"]) - {"frozen base"} <= subjects
    estimate = known["8B"]["dora"]
    entry = {
        "cell": ["8B", "bfloat16", "dora"], "state": "done", "rows": 4, "length": 2048,
        "ratio": [2 * estimate] * 3, "ms": [1.0] * 3, "frozen ms": [1.0] * 3, "peak": None,
    }  # fmt: skip
    line = list(gpu_results.markdown({"cells": [entry]}, {}))[-1]
    assert f"| {estimate:.2f} | -50 % |" in line


def test_a_shape_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["7B"])
    assert "'7B'" in capsys.readouterr().err
