"""Files of prompts, and of answers: order, interruption, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorakin as lk
from lorakin.cli.app import run
from lorakin.training import answer_rows, generate
from lorakin.training.contents import Conversation, PlainText
from lorakin.training.prompts import read_prompts

Write = Callable[..., str]
TEXTS = ["the cat", "a", "what did the dog run on", "who", "the bird flew over the mat"]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "a cat"}, "a cat"),
        ({"prompt": "a cat", "completion": "sat"}, "a cat"),
        ({"question": "who", "answers": {"text": ["me"], "answer_start": [0]}}, "who"),
        ({"question": "who", "context": "a mat"}, "who\n\na mat"),
        ({"text": "a cat"}, "a cat"),
        ({"text": "a cat", "label": 1}, "a cat"),
        ({"prompt": "a cat", "chosen": "sat", "rejected": "ran"}, "a cat"),
        ({"messages": [{"role": "user", "content": "a cat"}]}, ["a cat"]),
        (
            {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]},
            ["a", "b", "c"],
        ),
        ({"prompt": [{"role": "user", "content": "a cat"}]}, ["a cat"]),
        ({"instruction": "say it"}, ["say it"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["a"]),
    ],
    ids=str,
)  # fmt: skip
def test_rows_with_and_without_their_answers(
    row: dict[str, Any], asked: Any, write_rows: Write
) -> None:
    (prompt,) = read_prompts(write_rows([row]))
    if isinstance(prompt.content, PlainText):
        assert (prompt.content.prompt, prompt.content.answer) == (asked, "")
    else:
        assert isinstance(prompt.content, Conversation)
        assert [message["content"] for message in prompt.content.messages] == asked
    assert prompt.values == row


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " "},
        {"colour": "red"},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"prompt": None},
    ],
    ids=str,
)
def test_rows_that_ask_nothing(row: dict[str, Any], write_rows: Write) -> None:
    with pytest.raises(lk.DataError):
        read_prompts(write_rows([row]))


def answered(model: str, prompts: str, out: Path, **more: Any) -> dict[str, Any]:
    sampling = generate.Sampling(max_new_tokens=5, **more.pop("sampling", {}))
    settings = {"batch_size": 2, "dtype": "float32", **more}
    return answer_rows.answer_file(model, (), prompts, str(out), sampling, **settings)


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_rows_stand_in_their_order(model_dir: str, write_rows: Write, tmp_path: Path) -> None:
    rows = [{"prompt": text, "id": n} for n, text in enumerate(TEXTS)]
    out = tmp_path / "deep" / "answers.jsonl"
    done = answered(model_dir, write_rows(rows), out)
    assert done == {"out": str(out), "rows": 5, "resumed": 0}
    assert [{k: row[k] for k in ("prompt", "id")} for row in rows_in(out)] == rows
    loaded = answer_rows.load_speakers(model_dir, [], dtype="float32")[0].loaded
    assert [row["generated"] for row in rows_in(out)] == [
        generate.answer(loaded, text, max_new_tokens=5) for text in TEXTS
    ]
    assert [file.name for file in out.parent.iterdir()] == ["answers.jsonl"]
    with pytest.raises(lk.OutputError, match="exists"):
        answered(model_dir, write_rows(rows), out)


def test_an_interrupted_run_goes_on(
    model_dir: str, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_rows([{"prompt": text} for text in TEXTS])
    drawn = {"sampling": {"temperature": 1.0, "seed": 5}}
    answered(model_dir, prompts, tmp_path / "whole.jsonl", **drawn)
    calls, original = [], generate.generated

    def interrupted(*arguments: Any) -> Any:
        calls.append(len(arguments[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(generate, "generated", interrupted)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        answered(model_dir, prompts, out, **drawn)
    assert not out.exists()
    assert len(rows_in(partial)) == 3
    with partial.open("a") as file:
        file.write('{"row": 4, "na')  # as a kill leaves it
    with pytest.raises(lk.OutputError, match="sampling"):
        answered(model_dir, prompts, out)
    assert answered(model_dir, prompts, out, **drawn)["resumed"] == 2
    assert sum(calls) == 2 + 2 + 3
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not partial.exists()


def test_a_partial_file_that_is_something_else(
    model_dir: str, write_rows: Write, tmp_path: Path
) -> None:
    (tmp_path / "out.jsonl.partial").write_text("my notes\n")
    with pytest.raises(lk.OutputError, match="remove it"):
        answered(model_dir, write_rows([{"prompt": "a"}]), tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl.partial").read_text() == "my notes\n"


def test_a_column_in_the_way(model_dir: str, write_rows: Write, tmp_path: Path) -> None:
    with pytest.raises(lk.DataError, match="generated"):
        answered(model_dir, write_rows([{"prompt": "a", "generated": "b"}]), tmp_path / "o")


def test_the_command_writes_several_speakers(
    model_dir: str, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    from conftest import randomise

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    randomise(lk.adapt(model, lk.LoRA(rank=2))).save(tmp_path / "mine")
    common = ["generate", "-m", model_dir, "-a", str(tmp_path / "mine"), "--base"]
    common += ["--dtype=float32", "--max-new-tokens=3"]
    out = tmp_path / "answers.jsonl"
    prompts = write_rows([{"prompt": text} for text in TEXTS])
    assert run([*common, "--prompts", prompts, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 5
    assert [list(row["generated"]) for row in rows_in(out)] == [["base", "mine"]] * 5

    assert run([*common, "--prompt", TEXTS[0], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["answers"]
    assert said == rows_in(out)[0]["generated"]
    assert run([*common, "--prompt", TEXTS[0]]) == 0
    assert "── mine ──" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-p", "a", "--prompts", "b"],
        ["--prompts", "b"],
        ["-p", "a", "--out", "b"],
        ["-p", "a", "--top-p", "0.5"],
        ["--prompts", "nowhere.jsonl", "--out", "o"],
    ],
    ids=" ".join,
)
def test_what_is_missing_or_too_much(arguments: list[str], tmp_path: Path) -> None:
    assert run(["generate", "-m", "smollm2", *arguments]) == 2
