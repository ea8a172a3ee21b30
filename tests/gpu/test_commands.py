"""The commands on a GPU: train, resume, evaluate, generate, merge, compare."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorakin.cli.app import run
from lorakin.training import run_directory

Rows = list[dict[str, str]]


@pytest.fixture
def data(write_rows: Callable[..., str], chat_rows: Rows) -> str:
    return write_rows(chat_rows)


def trained(model: str, data: str, out: Path, *more: str) -> Path:
    command = ["train", "--model", model, "--data", data, "--out", str(out), "--steps", "6"]
    assert run([*command, "--batch-size", "2", "--max-length", "32", *more]) == 0
    return out


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "lora", "--dropout", "0.1"],
        ["--method", "dora,lora+", "--gradient-checkpointing"],
        ["--method", "adalora", "--fuse"],
        ["--method", "vera", "--dtype", "float16"],
        ["--method", "lora-drop"],
        ["--method", "lora-ga", "--rank", "4"],
        [
            "--method",
            "delta-lora",
            "--dtype",
            "bfloat16",
            "--accumulate",
            "2",
            "--set",
            "start_step=2",
        ],
    ],
    ids=lambda more: " ".join(more),
)
def test_training(
    more: list[str], model_dir: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained(model_dir, data, tmp_path / "out", *more)
    lines = [json.loads(line) for line in (out / run_directory.METRICS).read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert all(torch.isfinite(torch.tensor(losses)))
    capsys.readouterr()
    on_model = ["--model", model_dir, "--adapter", str(out)]
    assert run(["evaluate", *on_model, "--data", data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert run(["generate", *on_model, "--prompt", "the cat", "--max-new-tokens", "3"]) == 0


def test_resuming_has_the_bits_of_a_run_in_one_go(
    model_dir: str, data: str, tmp_path: Path
) -> None:
    more = ("--method", "adalora", "--dropout", "0.1", "--save-every", "3")
    whole = trained(model_dir, data, tmp_path / "whole", *more)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / run_directory.CHECKPOINTS / "checkpoint-6")
    trained(model_dir, data, resumed, *more, "--resume")
    one, two = ((path / "adapter_model.safetensors").read_bytes() for path in (whole, resumed))
    assert one == two
