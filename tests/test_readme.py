"""The README does what it says: its commands run, in order, and its Python example too."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_llama
from lorakin.cli.app import run
from lorakin.family import FAMILY

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(first_word: str) -> list[str]:
    lines = [
        line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()
    ]
    return [line for line in lines if line.split(" ")[0] == first_word]


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 120


def test_the_commands_run(
    tmp_path: Path,
    model_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a tiny model, in few steps; tests/test_demo.py has a real one."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(64)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{**row, "chosen": row.pop("completion"), "rejected": "No."} for row in rows]
    Path("prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    lines = commands("lorakin")
    assert len(lines) == 19
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("What is 1 plus 1?\n/base\n/compare\n")
    )  # for chat
    for line in lines:
        tiny = {"smollm2": model_dir, "30": "2", "steps=200": "steps=4"}
        arguments = [tiny.get(word, word) for word in shlex.split(line)[1:]]
        if arguments[0] == "compare":
            arguments += ["--seeds", "1", "--lr-sweep", "1e-3"]
        if arguments[0] == "chat":
            arguments += ["--max-new-tokens", "3"]
        assert run(arguments) == 0, line
    assert (tmp_path / "comparison" / "report.html").exists()
    assert (tmp_path / "my-adapter.html").exists()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 64
    assert (tmp_path / "another-adapter" / "adapter_model.safetensors").exists()
    assert "lr: 0.0001" in (tmp_path / "another-adapter" / "recipe.yaml").read_text()
    assert (tmp_path / "merged-model" / "model.safetensors").exists()


def test_the_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    assert len(example.strip().splitlines()) <= 11
    ids = torch.arange(3, 12).unsqueeze(0)
    names: dict[str, Any] = {
        "model": tiny_llama(),
        "another_model": tiny_llama(),
        "batches": [{"input_ids": ids, "labels": ids}] * 2,
    }
    exec(example, names)
    assert torch.equal(names["model"](ids).logits, names["another_model"](ids).logits)


def test_make_has_the_targets_that_the_readme_names() -> None:
    for target in {line.split()[1] for line in commands("make")} | set(
        re.findall(r"`make (\w+)`", README)
    ):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_table_of_members_is_the_family() -> None:
    assert re.findall(r"^\| .*? \| `([a-z+-]+)` \| \[.* \|$", README, re.MULTILINE) == [
        member.word for member in FAMILY
    ]
