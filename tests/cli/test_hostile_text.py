"""Labels, columns, rows, names and paths that strangers chose, through real commands: shown, never
obeyed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import lorakin as lk
from conftest import WORDS, randomise, tiny_llama
from lorakin.cli.app import run
from test_terminal import is_safe

ESCAPES = "[/x]\x1b[2J\x1b]0;t\x07\x9b1m\u202egpj[bold]"
NAME = ESCAPES.replace("/", "∕")


def said(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """All that a command prints, which no terminal obeys."""
    assert run(arguments) == code, capsys.readouterr()
    shown = "".join(capsys.readouterr())
    assert is_safe(shown), repr(shown)
    return shown


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory whose own name is hostile."""
    path = tmp_path / NAME
    path.mkdir()
    return path


def training_of(model: str, data: list[str], folder: Path) -> list[str]:
    short = ["--steps=1", "--dtype=float32", "--save-every=0"]
    return ["train", "-m", model, *data, "-o", str(folder / "out"), *short]


def test_labels_and_paths(
    bert_dir: str, write_rows: Callable[..., str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"{WORDS[n % 9]} sat", "label": ("good", ESCAPES)[n % 2]} for n in range(40)]
    data = ["-d", write_rows(rows)]
    shown = said(training_of(bert_dir, data, folder), 0, capsys)
    assert shown.count(r"x]\x1b[2J") >= 3, "in the classes and the paths"
    shown = said(["inspect", str(folder / "out")], 0, capsys)
    assert "[bold]" in shown
    said(["evaluate", "-m", bert_dir, "-a", str(folder / "out"), *data], 0, capsys)


def test_rows_and_prompts(
    model_dir: str,
    write_rows: Callable[..., str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"prompt": f"the {ESCAPES} cat {n}", "completion": ESCAPES + " sat"} for n in range(40)]
    said(training_of(model_dir, ["-d", write_rows(rows)], folder), 0, capsys)
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerFast, "decode", lambda *_, **__: f"so {ESCAPES} "
    )
    generate = ["generate", "-m", model_dir, "-p", ESCAPES, "--max-new-tokens=2"]
    run(generate)
    assert ESCAPES in capsys.readouterr().out, "into a pipe goes what the model said"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert r"\x1b[2J" in said(generate, 0, capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "-m", NAME, "-d", "x.jsonl", "-o", "y"],
        ["train", "-m", "org/x", "-d", NAME, "-o", "y"],
        ["train", NAME],
        ["inspect", NAME],
        ["plan", "-m", NAME],
        ["merge", "-a", NAME, "-o", "y"],
        ["export", NAME, "--to", NAME, "-o", "y"],
        ["convert", NAME, "-m", NAME, "-o", "y"],
        ["combine", f"{NAME}=1", "-m", NAME, "-o", "y"],
        ["compare", "-m", NAME, "-d", NAME, "-o", "y", "--methods", NAME],
        ["nonsense" + NAME],
        ["train", "--nonsense" + NAME],
        ["plan", "-m", "smollm2", "--steps", NAME],
    ],
    ids=lambda arguments: arguments[0][:8],
)
def test_what_the_user_wrote_comes_back_in_errors(
    arguments: list[str],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    said(arguments, 2, capsys)


@pytest.mark.filterwarnings("default::lorakin.errors.LorakinWarning")
def test_keys_and_names_in_an_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    adapter = lk.adapt(model, lk.LoRA(rank=2), targets="q_proj")
    randomise(adapter)
    out = adapter.save(folder / "adapter")
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "lorakin.json").unlink()
    for field in (
        "base_model_name_or_path",
        "target_modules",
        "task_type",
        "revision",
        "peft_type",
        ESCAPES,
    ):
        (out / "adapter_config.json").write_text(json.dumps(config | {field: ESCAPES}))
        run(["inspect", str(out)])
        shown = "".join(capsys.readouterr())
        assert is_safe(shown), (field, shown)
    (out / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{ESCAPES}.q_proj.lora_{side}.weight": torch.ones(2, 2) for side in "AB"
    }
    safetensors.torch.save_file(tensors, out / "adapter_model.safetensors")
    assert r"\x1b" in said(["inspect", str(out)], 0, capsys)


def test_the_command_to_go_on_with_is_quoted(
    model_dir: str,
    write_rows: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lorakin.training import train

    out = tmp_path / "my $(touch pwned) out; rm x"
    rows = [{"prompt": f"the cat {n}", "completion": "sat"} for n in range(40)]

    def interrupted(run: train.PreparedRun) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    run(
        [
            "train",
            "-m",
            model_dir,
            "-d",
            write_rows(rows),
            "-o",
            str(out),
            "--steps=1",
            "--dtype=float32",
        ]
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if "resume with: " in line)
    assert shlex.split(line.partition("resume with: ")[2]) == [
        "lorakin",
        "train",
        "--resume",
        "--out",
        str(out),
    ]
