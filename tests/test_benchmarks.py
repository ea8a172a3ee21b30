"""The benchmark runs and gives ratios; what they are is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import gpu
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


def test_the_gpus_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["tiny", "--device", "cpu", "--rounds", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "| " in line]
    names = [row[0].removeprefix("| ") for row in rows[1:]]
    assert {"lora", "dora", "PEFT, lora", "PEFT narrow, dora", "lora, `lk.fuse`"} < set(names)
    assert all(float(row[1].split()[0]) > 0 for row in rows[1:])
