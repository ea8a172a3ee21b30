"""The main job, shortened: real weights, real data, from the command to an adapter that PEFT
loads.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers

import lorakin as lk
from lorakin.cli import demo
from lorakin.cli.app import run
from lorakin.training.docstrings import docstring_rows
from lorakin.training.model_sources import packaged
from lorakin.training.models import load_model

pytestmark = pytest.mark.model


def test_the_rows_are_what_they_say() -> None:
    rows = docstring_rows()
    assert len(rows) > 2500
    assert rows == docstring_rows()
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows[:300]:
        assert 12 <= len(row["completion"]) <= 160
        assert row["completion"] not in row["prompt"], "the answer is not in the question"
        code = row["prompt"].split("\n\n", 1)[1]
        assert len(code) <= 400
        compile(
            code, "row", "exec", dont_inherit=True, flags=0
        ) if "await" not in code and "yield" not in code else None


def test_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packaged("smollm2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "HELD_OUT_ROWS", 24)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 8)
    assert run(["demo", "--steps", "4"]) == 0
    shown = capsys.readouterr().out
    perplexity = [float(figure) for figure in re.findall(r"perplexity ([\d.]+) over", shown)]
    assert len(perplexity) == 3, "before, and both again at the end"
    assert perplexity[-1] < 0.7 * perplexity[-2]
    assert shown.count("its author") == shown.count("  before ") == shown.count("  after ") == 3
    for part in (
        "tok/s",
        "trained",
        "peak memory",
        "MiB",
        "loss.png",
        "metrics.jsonl",
        "recipe.yaml",
        "⟦",
    ):
        assert part in shown, part
    following = re.findall(
        r"^  .*?lorakin (.*)$|^  .*?python\S* (.*)$", shown.split("\nnext\n")[1], re.MULTILINE
    )
    assert len(following) == 5
    for line in (found[0] for found in following):
        if line.startswith(("evaluate", "inspect", "merge")):
            assert run(shlex.split(line)) == 0, line
    assert run(["demo", "--steps", "1", "--out", "."]) == 2, (
        "a directory that no demo made is left alone"
    )
    compare_with_peft(tmp_path / "demo" / "adapter", tmp_path / "demo" / "merged")


def compare_with_peft(adapter: Path, merged: Path) -> None:
    """The adapter in float32: lorakin's logits are PEFT's and the merged model's."""
    peft = pytest.importorskip("peft")
    loaded = load_model("smollm2", "float32")
    ids = torch.tensor([loaded.tokenizer("def add(a, b):\n    return a + b\n")["input_ids"]])
    with torch.no_grad():
        base = loaded.model(ids).logits
        lk.load(loaded.model, adapter)
        ours = loaded.model(ids).logits
        lk.adapters(loaded.model)["default"].remove()
        theirs = peft.PeftModel.from_pretrained(loaded.model, adapter).eval()(ids).logits
        plain = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(
            ids
        ).logits
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=5e-4)
