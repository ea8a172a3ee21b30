"""Damaged and hostile results of a comparison: they lead to a clear error or to a report.

Nothing outside the comparison's directory is touched.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import lorakin as lk
import soak
from lorakin.cli.app import run as cli
from lorakin.compare import arms as arms_
from lorakin.compare import directory
from lorakin.compare.comparison import Comparison
from lorakin.compare.prepared_comparison import PreparedComparison
from lorakin.compare.report_answers import ReportAnswers
from lorakin.compare.results import DONE, SEED, SWEEP, ResultRow, Results, Trial
from lorakin.compare.split import Parts
from lorakin.report import comparison_page

COUNT = soak.count("LORAKIN_FUZZ", 400) // 16
NUMBERS = [-1, 0, 1, 2**62, 10**400, 1e308, 1e99, -1e99, 1e-300, math.nan, math.inf, -math.inf]
TEXTS = [
    "",
    "²",
    "x" * 10_000,
    "../../../etc",
    "\x00",
    "[/x]",
    "</script><script>alert(1)</script>",
]
OTHERS: list[Any] = [None, True, "done", [], [[]], [None], {}, {"loss": "x"}, {"²": 1}]
JUNK: list[Any] = [*NUMBERS, *TEXTS, *OTHERS]
PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "classifier"]


def row(arm: str, stage: str, lr: float | None, seed: int, loss: float) -> ResultRow:
    trains = lr is not None
    figures = {"loss": loss, "accuracy": 0.5, "count": 40}
    change = {"norm": 1.0, "relative": 0.1, "rank": 2.0}
    return ResultRow(
        Trial(arm, stage, lr, seed),  # type: ignore[arg-type]
        DONE,
        steps=4,
        tune=figures,
        report=figures,
        answers=ReportAnswers([loss, 2 * loss, loss], [3, 4, 3], [0, 1, 1], [0, 1, 0]),
        trained=100,
        frozen=5,
        adapter_bytes=4000,
        step_seconds=0.01,
        step_work=0.01,
        seconds=1.0,
        peak_bytes=1000,
        device="cpu",
        losses=[2.0, 1.5, 1.2, loss] if trains else [],
        layers=dict.fromkeys(PATHS, change) if trains else {},
        moves=[(n, dict.fromkeys(PATHS, (0.1 * n, 0.2))) for n in (1, 2)] if trains else [],
        ranks=[(n, dict.fromkeys(PATHS, 5 - n)) for n in (1, 2)] if arm == "adalora" else [],
        importance=dict.fromkeys(PATHS, 0.3) if arm == "vera" else {},
        own=PATHS[:1],
        warnings=["so"],
    )


def rows() -> list[dict[str, Any]]:
    """The rows of a whole comparison."""
    found = [row("base", "limit", None, 0, 3.0)]
    for n, arm in enumerate(("lora", "adalora", "vera")):
        for place, lr in enumerate((2e-4, 6.3e-4, 2e-3)):
            found.append(row(arm, SWEEP, lr, 0, 1.0 + 0.1 * place - 0.01 * n))
        found.append(row(arm, SEED, 2e-4, 1, 1.02 - 0.01 * n))
    return [json.loads(one.as_json()) for one in found]


def comparison_in(out: Path) -> PreparedComparison:
    asked = Comparison(
        model="m", data="d.jsonl", out=str(out), methods=["adalora", "vera"], rank=2, seeds=2
    )
    arms = arms_.arms_of(asked.methods, asked.size, 200, asked.settings, asked.dropout)
    return PreparedComparison(
        asked, out, arms, Parts(10, 5, 5, "", None), Results(out / directory.RESULTS), "float32"
    )


def write(out: Path, content: list[dict[str, Any]]) -> None:
    (out / directory.RESULTS).write_text("".join(json.dumps(one) + "\n" for one in content))


def places(content: Any) -> Any:
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from places(content[key])


def test_a_whole_comparison_has_a_report(tmp_path: Path) -> None:
    write(tmp_path, rows())
    comparison_run = comparison_in(tmp_path)
    html = comparison_page.html(comparison_run, comparison_page.findings_of(comparison_run))
    assert "Ranks in all over the steps" in html
    assert comparison_run.remaining()


def test_mutated_results(tmp_path: Path) -> None:
    chance = random.Random(7)
    whole, said = rows(), list[str]()
    for number in range(COUNT):
        content = copy.deepcopy(whole)
        for _ in range(chance.choice([1, 1, 3])):
            holder, key = chance.choice(list(places(chance.choice(content))))
            if number % 4 == 0 and isinstance(holder, dict):
                holder[chance.choice(["", "trial", "²", "__class__"])] = holder.pop(key)
            else:
                holder[key] = chance.choice(JUNK)
        write(tmp_path, content)
        try:
            comparison_run = comparison_in(tmp_path)
        except lk.DataError as error:
            said.append(str(error))
            continue
        comparison_run.remaining(), comparison_run.expected()
        html = comparison_page.html(comparison_run, comparison_page.findings_of(comparison_run))
        assert "<script>alert" not in html
    assert all(
        re.search(r"results\.jsonl, line \d+ is not a row", line) and len(line) < 1000
        for line in said
    )
    assert COUNT // 20 < len(said) < COUNT - COUNT // 20
    soak.record(
        "Hostile files",
        files="results of comparisons",
        tried=COUNT,
        refused=len(said),
        usable=COUNT - len(said),
    )


def test_a_crafted_row_deletes_nothing(tmp_path: Path) -> None:
    """The seed is text that leads out of the directory."""
    out, victim = tmp_path / "out", tmp_path / "victim"
    (out / directory.TRIALS).mkdir(parents=True)
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    crafted = rows()
    crafted[1]["trial"]["seed"] = "/../../../victim"
    write(out, crafted)
    with pytest.raises(lk.DataError, match=r"line 2.*trial\.seed"):
        comparison_in(out)
    write(out, rows()[:3])
    comparison_run = comparison_in(out)
    forged = Trial("lora", SWEEP, 2e-4, "/../../../victim")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name"):
        _ = forged.name
    for arm in ("..", "a/b", "../../victim", "", ".", "x\x00y", "~"):
        with pytest.raises(ValueError, match="name"):
            _ = Trial(arm, SWEEP, None, 0).name
    comparison_run.record_result(row("lora", SWEEP, 2e-3, 0, 0.5))
    assert (victim / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "where",
    ["trials", "data", "trials/lora-lr0.0002-seed0", "trials/lora-lr0.0002-seed0.log", ".lock"],
)
def test_links_in_a_comparison_are_not_followed(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.mkdir()
    (victim / "lora-lr0.0002-seed0").mkdir()
    (victim / "thesis.txt").write_text("mine")
    (out / where).parent.mkdir(parents=True)
    (out / where).symlink_to(
        victim / "thesis.txt" if "." in Path(where).suffix + where[:1] else victim
    )
    asked = Comparison(
        model="m", data="d.jsonl", out=str(out), methods=["adalora", "vera"], rank=2, seeds=2
    )
    (out / directory.SETTINGS).write_text(yaml.safe_dump(asked.as_dict()))
    before = sorted(tmp_path.rglob("*"))
    assert (
        cli(["compare", "-m", "m", "-d", "d.jsonl", "-o", str(out), "--methods", "adalora vera"])
        == 2
    )
    assert " link" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert (victim / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "1",
        "{}",
        "model: m",
        "x: [",
        "? [a]\n: 1",
        "parts: {train: x}",
        "null",
        "parts: []\nmodel: m",
        "\x00",
    ],
)
def test_a_damaged_comparison_file(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / directory.SETTINGS).write_text(content)
    assert (
        cli(["compare", "-m", "m", "-d", "d.jsonl", "-o", str(tmp_path), "--methods", "vera"]) == 2
    )
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "comparison" in said


def test_the_command_to_copy_is_quoted(tmp_path: Path) -> None:
    import html as escapes
    import shlex

    # Without answers nobody knows that these models do not do better than a constant.
    write(tmp_path, [{**one, "answers": None} for one in rows()])
    comparison_run = comparison_in(tmp_path)
    data, model = "my rows; $(rm -rf ~).jsonl", "it's a model\x1b[201~\n"
    comparison_run.comparison.data, comparison_run.comparison.model = data, model
    comparison_run.comparison.recipe = {
        "targets": ["q_proj", ".*(a|b)$"],
        "fuse": True,
        "chat_template": False,
        "batch_size": 4,
    }
    page = comparison_page.html(comparison_run, comparison_page.findings_of(comparison_run))
    (line,) = re.findall(r"<pre[^>]*><code>(lorakin train .*?)</code>", page)
    said = escapes.unescape(line)
    assert "\x1b" not in said
    assert "\n" not in said
    words = shlex.split(said.replace("$'it\\'s a model\\x1b[201~\\n'", "MODEL"))
    assert words[2:6] == ["--model", "MODEL", "--data", data]
    for flag, values in (
        ("--targets", ["q_proj", ".*(a|b)$"]),
        ("--batch-size", ["4"]),
        ("--out", ["adapter"]),
    ):
        assert [after for word, after in itertools.pairwise(words) if word == flag] == values
    assert {"--fuse", "--no-chat-template"} <= set(words)
