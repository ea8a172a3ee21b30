"""Names that no file system has: one sentence, wherever a name becomes a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorakin as lk
from lorakin.cli.app import run
from lorakin.storage import paths

NAMES = ["a" * 300, "d/" * 3000, "a\0b", "~nobody-of-that-name/x", "\ud800"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_path(name: str) -> None:
    with pytest.raises(lk.SettingError, match="--out"):
        paths.user_path(name, "--out")


def test_names_that_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.user_path("~/ä b\udcff", "--out") == tmp_path / "ä b\udcff"
    assert paths.user_path("a" * 255, "--out") == Path("a" * 255)


@pytest.mark.parametrize("name", NAMES[:4])
def test_every_command_says_so(
    name: str, model_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    train = ["train", "--model", model_dir, "--data", str(tmp_path / "rows.jsonl"), "--out"]
    commands: list[list[Any]] = [
        [*train, name],
        [*train, name, "--resume"],
        [*train, str(tmp_path / "new"), "--chat-template", name],
        ["generate", "--prompt", "a", "--model", name],
        ["generate", "--prompt", "a", "--model", model_dir, "--adapter", name],
        ["inspect", name],
        ["plan", "--model", name],
        ["demo", "--out", name],
        ["compare", "--model", model_dir, "--data", str(tmp_path / "rows.jsonl"), "--out", name],
        ["merge", "--model", model_dir, "--adapter", name, "--out", name],
    ]
    for command in commands:
        assert run(command) == 2, command
        said = capsys.readouterr().err.replace("\n", " ")
        assert "cannot be a path" in said or "embedded null byte" in said, (
            command
        )  # the latter is typer's, of a Path


def test_a_result_goes_into_a_directory() -> None:
    from lorakin.serving.output import new_directory

    with (
        pytest.raises(lk.LorakinError, match="/dev/null"),
        new_directory("/dev/null"),
    ):
        pass
