"""A run that another process asks to pause or to stop."""

from __future__ import annotations

import io
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from rich.console import Console
from safetensors.torch import load_file

import lorakin as lk
from lorakin.cli.app import run as run_command
from lorakin.storage import locks
from lorakin.training import checkpoints, processes, requests, run_directory, watching
from lorakin.training import train as training
from lorakin.training.metrics_file import Metrics
from lorakin.training.recipe import Recipe
from training.saved import same

Make = Callable[..., Recipe]
AT = 5


class Asking(transformers.TrainerCallback):
    """Asks, while a step is at work."""

    def __init__(self, out: str, request: requests.Request) -> None:
        self.out, self.request = Path(out), request

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == AT - 1:
            requests.ask(self.out, self.request)


def run(
    recipe: Recipe, request: requests.Request | None = None, resume: bool = False
) -> training.Result:
    asking = [] if request is None else [Asking(recipe.out, request)]
    prepared = training.prepare(recipe, Console(file=io.StringIO()), resume)
    return training.train(prepared, callbacks=asking)


def resumed(out: str) -> training.Result:
    return run(run_directory.resumed_recipe(None, {"out": out}), resume=True)


def last_of(recipe: Recipe) -> Path:
    found = checkpoints.last_checkpoint(Path(recipe.out) / "checkpoints")
    assert found is not None
    return found


@pytest.mark.parametrize("settings", [{}, {"save_every": 0}, {"keep": "best", "eval_every": 4}])
def test_a_run_that_was_paused_ends_as_one_that_was_not(
    make: Make, settings: dict[str, Any]
) -> None:
    whole, paused = make("whole", **settings), make("paused", **settings)
    result = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(paused, requests.PAUSE)
    out = Path(paused.out)
    assert checkpoints.step_of(last_of(paused)) == AT
    assert not (out / "adapter_config.json").exists() and not (out / ".request").exists()
    again = resumed(paused.out)
    assert same(whole.out, paused.out) and again.ending == result.ending
    losses = [
        [row.get("loss") for row in Metrics(Path(one.out) / "metrics.jsonl", writes=False).rows()]
        for one in (whole, paused)
    ]
    assert losses[0] == losses[1]


def test_a_run_that_is_stopped_keeps_its_last_step(make: Make) -> None:
    stopped, paused = make("stopped"), make("paused")
    result = run(stopped, requests.STOP)
    with pytest.raises(KeyboardInterrupt):
        run(paused, requests.PAUSE)
    assert (result.steps, result.ending.best_step) == (AT, None)
    assert result.ending.words == "stopped after step 5 of 12"
    tensors = [
        load_file(folder / "adapter_model.safetensors")
        for folder in (Path(stopped.out), last_of(paused))
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensor.equal(tensors[1][name]) for name, tensor in tensors[0].items())
    assert not (Path(stopped.out) / ".request").exists()


def test_a_run_that_keeps_its_best_step_keeps_the_best_until_it_is_stopped(make: Make) -> None:
    recipe = make("out", keep="best", eval_every=2)
    result = run(recipe, requests.STOP)
    rows = Metrics(Path(recipe.out) / "metrics.jsonl", writes=False).rows()
    figures = {r["step"]: r["eval_loss"] for r in rows if "eval_loss" in r and r["step"]}
    assert list(figures) == [2, 4, AT]
    assert result.ending.best_step == min(figures, key=lambda step: figures[step])
    assert result.after.loss == figures[result.ending.best_step]


def test_what_was_asked_of_an_earlier_run_is_forgotten(make: Make, tmp_path: Path) -> None:
    recipe = make("out", steps=2)
    Path(recipe.out).mkdir()
    (Path(recipe.out) / ".request").write_text("stop")
    assert run(recipe).steps == 2


def test_nothing_is_asked_where_no_run_is_at_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(lk.StateError, match="no run is at work"):
        requests.ask(tmp_path, requests.STOP)
    assert list(tmp_path.iterdir()) == []
    assert run_command(["stop", str(tmp_path)]) == 2
    assert f"no run is at work in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("request_", [requests.PAUSE, requests.STOP])
def test_the_commands_ask(
    request_: requests.Request, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locks.locked(tmp_path / ".lock"):
        assert run_command([request_, str(tmp_path)]) == 0
    assert requests.asked(tmp_path) == request_
    assert "after its current step" in capsys.readouterr().out


def test_processes_look_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "agreed", lambda value: looked.append(value) or value)
    (tmp_path / ".request").write_text("stop")
    callback = watching.Requests(tmp_path, evaluates=False)
    control = transformers.TrainerControl()
    for step in range(1, 11):
        assert not control.should_training_stop
        callback.on_step_end(None, types.SimpleNamespace(global_step=step, max_steps=20), control)
    assert looked == ["stop"] and control.should_training_stop
