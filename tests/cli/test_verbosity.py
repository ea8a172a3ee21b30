"""`--quiet`, `--verbose`, and what the shell completes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakin.cli.app import run
from lorakin.cli.verbosity import chosen, messages_on
from lorakin.training.alarms import warn

Write = Callable[..., str]


def training_of(model: str, data: str, out: Path) -> list[str]:
    return ["train", "-m", model, "-d", data, "-o", str(out), "--steps=2", "--dtype=float32"]


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after it"])
def test_quiet_shows_the_result_alone(
    model_dir: str, write_rows: Write, chat_rows: list[dict[str, str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], before: bool,
) -> None:  # fmt: skip
    arguments = training_of(model_dir, write_rows(chat_rows), tmp_path / "out")
    assert run(["-q", *arguments] if before else [*arguments, "--quiet"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown] == ["held out after", "adapter"]
    assert run(training_of(model_dir, write_rows(chat_rows), tmp_path / "other")) == 0
    assert "one example" in capsys.readouterr().out


def test_warnings_are_shown_when_it_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-q", "methods"]) == 0
    assert "lora" in capsys.readouterr().out
    console = messages_on(False)
    console.print("on the way")
    warn(console, "the loss does not fall")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == "warning: the loss does not fall"
    assert run(["methods"]) == 0
    assert not chosen.quiet


def test_verbose_shows_where_an_error_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, traced in ((["-v"], True), ([], False)):
        assert run([*arguments, "inspect", str(tmp_path / "none")]) == 2
        shown = capsys.readouterr().err
        assert ("Traceback" in shown) == traced
        assert shown.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("arguments", [["-q", "methods", "-v"], ["methods", "-q", "-v"]])
def test_both(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "contradict" in capsys.readouterr().err


def completed(typed: str, shell: str = "bash") -> list[str]:
    """What the shell offers for the last word of what was typed."""
    command = [sys.executable, "-c", "from lorakin.cli import main; main()"]
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    asked = os.environ | words | {"_LORAKIN_COMPLETE": f"complete_{shell}"}
    done = subprocess.run(command, env=asked, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("lorakin tr", ["train"]),
        ("lorakin train --grad", ["--gradient-checkpointing"]),
        ("lorakin train --loss-on ", ["last", "answers", "all"]),
        ("lorakin evaluate --format sq", ["squad"]),
        ("lorakin chat --temp", ["--temperature"]),
    ],
)
def test_the_shell_completes(typed: str, offered: list[str]) -> None:
    assert completed(typed) == offered


def test_completion_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from lorakin.cli import main; main()"]
    # Without this, typer takes the shell that runs the tests, if there is one.
    home = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run([*command, "--install-completion", "bash"], env=home, timeout=60)
    assert done.returncode == 0
    script = (tmp_path / ".bash_completions" / "lorakin.sh").read_text()
    assert "_LORAKIN_COMPLETE=complete_bash" in script
