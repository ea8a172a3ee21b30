"""The benchmark runs and gives ratios; what they are is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def bench(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_quick_form_measures_every_part(tmp_path: Path) -> None:
    done = bench(tmp_path, "--members", "lora,dora,vera")
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
    ("arguments", "said"),
    [(["--members", "lorra"], "no member 'lorra'"), (["steppes"], "no part 'steppes'")],
)
def test_what_is_unknown_is_said_before_anything_runs(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = bench(tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()
