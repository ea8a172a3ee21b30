"""Killed anywhere: what is on disk loads, and the run that goes on ends with the bits of one that
was never killed.

`LORAKIN_KILLS=200` kills more often than the usual ten times.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import lorakin as lk
import soak
from lorakin.family import FAMILY
from lorakin.training import run_directory
from lorakin.training import train as training
from lorakin.training.models import load_model
from lorakin.training.recipe import Recipe
from lorakin.training.trainers import last_checkpoint
from training.saved import tensors

KILLS = soak.count("LORAKIN_KILLS", 10)
STEPS = 12
SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 6, "target_rank": 3, "start": 2, "finish": 4},
    "delta-lora": {"start_step": 4},
    "lora-ga": {"rank": 4},
    "lora-xs": {"rank": 4},
    "lora-drop": {"keep": 5, "probe_epochs": 1, "sample": 0.5},
    "vera": {"rank": 16},
}

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["lorakin.training.train"])


def serve(recipe: Recipe, resume: bool, most_bytes: int | None = None) -> None:
    """In a child: train, or go on."""
    torch.set_num_threads(1)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    console = Console(quiet=True)
    if resume:
        recipe = run_directory.resumed_recipe(None, {"out": recipe.out})
    try:
        training.train(training.prepare(recipe, console, resume))
    except lk.LorakinError as error:
        Path(recipe.out).with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(error.exit_code) from None


def start(recipe: Recipe, resume: bool = False, most_bytes: int | None = None) -> Any:
    child = children.Process(target=serve, args=(recipe, resume, most_bytes))
    child.start()
    return child


def check_what_is_there(out: Path, recipe: Recipe) -> int:
    """The step of the last checkpoint, once it and the adapter, if there is one, have been
    loaded.
    """
    checkpoint = last_checkpoint(out / run_directory.CHECKPOINTS)
    for folder in (checkpoint, out):
        if folder is not None and (folder / "adapter_config.json").exists():
            lk.load(load_model(recipe.model, "float32").model, folder)
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))


@pytest.fixture
def recipe(
    model_dir: str, chat_rows: list[dict[str, str]], write_rows: Callable[..., str], tmp_path: Path
) -> Callable[..., Recipe]:
    data = write_rows(chat_rows, "train.jsonl")

    def make(words: str, out: str) -> Recipe:
        return Recipe(
            model_dir,
            data,
            str(tmp_path / out),
            words,
            eval_data=data,
            dtype="float32",
            lr=2e-2,
            steps=STEPS,
            save_every=1,
            settings=SETTINGS.get(words, {}),
            eval_every=1,
            keep="best" if len(words) % 2 else "last",
        )

    return make


def test_killed_at_any_moment(recipe: Callable[..., Recipe]) -> None:
    chance = random.Random(7)
    whole: dict[str, tuple[dict[str, torch.Tensor], float]] = {}
    kills, finished, steps_lost = 0, 0, []
    members = [member.word for member in FAMILY]
    chance.shuffle(members)
    for words in itertools.cycle(members):
        if kills >= KILLS:
            break
        if words not in whole:
            begun = time.monotonic()
            child = start(recipe(words, f"{words}-whole"))
            child.join()
            assert child.exitcode == 0, words
            whole[words] = (
                tensors(Path(recipe(words, f"{words}-whole").out)),
                time.monotonic() - begun,
            )
        expected, usual = whole[words]
        given = recipe(words, f"{words}-killed")
        out = Path(given.out)
        shutil.rmtree(out, ignore_errors=True)
        for attempt in itertools.count():
            resume = (out / run_directory.RECIPE).is_file()
            if not resume:
                shutil.rmtree(out, ignore_errors=True)
            before = check_what_is_there(out, given) if resume else 0
            child = start(given, resume)
            if attempt == 4 or kills >= KILLS:  # now let it come to its end
                child.join()
                break
            child.join(chance.uniform(0.05, usual))
            if child.exitcode is not None:
                break
            child.kill()
            child.join()
            kills += 1
            assert check_what_is_there(out, given) >= before, "no checkpoint that was there is lost"
            steps_lost.append(check_what_is_there(out, given))
        assert child.exitcode == 0
        finished += 1
        now = tensors(out)
        assert now.keys() == expected.keys()
        assert all(torch.equal(tensor, now[key]) for key, tensor in expected.items()), (
            f"{words} after kills"
        )
    assert kills >= KILLS
    assert any(steps_lost), "some kill fell into training"
    soak.record(
        "Killed with SIGKILL while training and saving",
        kills=kills,
        runs=finished,
        lost=0,
        largest_difference=0,
    )


def test_two_runs_in_one_directory(recipe: Callable[..., Recipe]) -> None:
    """The second ends at once, begun anew or resumed, while the first lives; when that is killed,
    the run goes on.
    """
    given = recipe("lora", "shared")
    out = Path(given.out)
    first = start(given)
    while last_checkpoint(out / run_directory.CHECKPOINTS) is None:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)
    for resume in (False, True):
        second = start(given, resume)
        second.join()
        assert second.exitcode == 2
        assert f"is in use: process {first.pid} " in out.with_suffix(".error").read_text()
    first.kill()
    first.join()
    assert (out / ".lock").exists(), "which nobody holds any more"
    third = start(given, resume=True)
    third.join()
    assert third.exitcode == 0
    assert not (out / ".lock").exists()


def test_a_full_disk_ends_the_run_with_its_last_checkpoint(recipe: Callable[..., Recipe]) -> None:
    """The size limit of a process makes its writes fail as a full disk does: here the optimizer's
    state, then the adapter.
    """
    given = recipe("lora", "full")
    out = Path(given.out)
    child = start(given)
    while last_checkpoint(out / run_directory.CHECKPOINTS) is None:
        time.sleep(0.02)
    child.kill()
    child.join()
    step = check_what_is_there(out, given)
    size = (
        (out / run_directory.CHECKPOINTS / f"checkpoint-{step}" / "adapter_model.safetensors")
        .stat()
        .st_size
    )
    for most in (size + 10_000, size // 2):
        child = start(given, True, most)
        child.join()
        assert child.exitcode == 2
        said = out.with_suffix(".error").read_text()
        assert said.startswith("OutputError: ")
        assert "cannot write" in said
        assert check_what_is_there(out, given) >= step
    child = start(given, True)
    child.join()
    assert child.exitcode == 0
