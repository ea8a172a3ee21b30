"""`--gpus`, `--fsdp` and `--zero`: what is started, and what is refused before that.

`test_processes.py` starts two processes with `--gpus 2`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config import config_args
from accelerate.commands.launch import launch_command_parser

import lorakin as lk
from lorakin.cli.app import run
from lorakin.training import launching


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "available", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def parsed(options: list[str]) -> argparse.Namespace:
    return launch_command_parser().parse_args([*options, "--module", "lorakin"])


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    asked: list[tuple[tuple[Any, ...], int | None]] = [
        ((None, False, None), None), (("1", False, None), None), (("all", False, None), 2),
        (("2", False, None), 2), ((None, True, None), 2), ((None, False, 3), 2),
        (("1", True, None), 1),
    ]  # fmt: skip
    for options, count in asked:
        assert launching.wanted(*options) == count, options


@pytest.mark.parametrize(
    "options",
    [
        ("3", False, None), ("0", False, None), ("some", False, None), ("-1", False, None),
        ("2", True, 3), (None, False, 4), (None, False, 0),
    ],
)  # fmt: skip
def test_what_is_refused(options: tuple[Any, ...]) -> None:
    with pytest.raises(lk.SettingError):
        launching.wanted(*options)


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(lk.SettingError, match="pip install deepspeed"):
        launching.wanted(None, False, 2)
    monkeypatch.setattr(launching, "available", lambda: 0)
    for options in (("all", False, None), ("1", False, None), (None, True, None)):
        with pytest.raises(lk.SettingError, match="has 0 GPUs"):
            launching.wanted(*options)


def test_a_process_that_was_launched_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for options in (("4", False, None), ("all", True, None), (None, True, None)):
        assert launching.wanted(*options) is None
    for other in (("2", False, None), (None, False, 3)):
        with pytest.raises(lk.SettingError):
            launching.wanted(*other)


def test_accelerate_takes_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config_args, "default_config_file", str(config))
    plain = parsed(launching.accelerate_options(2, False, None))
    assert (plain.num_processes, plain.multi_gpu, plain.num_machines) == (2, True, 1)
    sharded = parsed(launching.accelerate_options(4, True, None))
    assert (sharded.use_fsdp, sharded.fsdp_version, sharded.multi_gpu) == (True, "2", False)
    zero = parsed(launching.accelerate_options(4, False, 3))
    assert (zero.use_deepspeed, zero.zero_stage) == (True, 3)
    config.write_text("distributed_type: FSDP\n")
    assert not parsed(launching.accelerate_options(2, False, None)).multi_gpu, "the file decides"


def test_the_command_gives_each_process_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(launching, "launch", lambda *given: started.append(given) or 5)
    words = ["train", "--model", "m", "--data", "d", "--gpus", "2", "--out", "o"]
    monkeypatch.setattr(sys, "argv", ["lorakin", *words])
    assert run(words) == 5
    assert started == [(2, False, None, words)]
