"""One run works in an output directory at a time, and the one that goes on is the one that was
begun.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import lorakin as lk
from lorakin.cli.app import run as command
from lorakin.storage import locks
from lorakin.training import processes, run_directory
from lorakin.training import train as training
from lorakin.training.recipe import Recipe
from lorakin.training.recipe_file import write_recipe

children = multiprocessing.get_context("fork")


def work(recipe: Recipe, ready: Any) -> None:
    place = run_directory.lock_run_directory(recipe, Path(recipe.out), resume=False)
    (Path(recipe.out) / run_directory.RECIPE).write_text("model: m\ndata: d\nout: o\n")
    ready.send(os.getpid())
    time.sleep(60)
    place.release()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe("nowhere", "nothing.jsonl", str(tmp_path / "new" / "out"))


@pytest.fixture
def other(recipe: Recipe) -> Iterator[Any]:
    """A process that is at work in the directory."""
    ready, send = children.Pipe(duplex=False)
    child = children.Process(target=work, args=(recipe, send))
    child.start()
    ready.recv()
    yield child
    child.kill()
    child.join()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_is_refused_while_the_first_lives(
    resume: bool, other: Any, recipe: Recipe
) -> None:
    out = Path(recipe.out)
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(
        lk.OutputError, match=rf"out is in use: process {other.pid} on .* Wait until it has ended"
    ):
        training.prepare(recipe, Console(quiet=True), resume)
    assert sorted(path.name for path in out.iterdir()) == before
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with pytest.raises(
        lk.LorakinError, match=r"not empty; choose" if not resume else r"nothing.jsonl"
    ):
        training.prepare(recipe, Console(quiet=True), resume)
    assert [path.name for path in out.iterdir()] == [run_directory.RECIPE]


def test_what_is_refused_leaves_nothing(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(lk.DataError, match=r"nothing.jsonl"):
        training.prepare(recipe, Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_a_directory_in_which_only_a_lock_was_left_is_empty(recipe: Recipe) -> None:
    """As a kill leaves it, before anything was written."""
    out = Path(recipe.out)
    out.mkdir(parents=True)
    (out / run_directory.LOCK).touch()
    run_directory.lock_run_directory(recipe, out, resume=False).release()
    assert not list(out.iterdir())


def test_of_one_process_too(recipe: Recipe) -> None:
    place = run_directory.lock_run_directory(recipe, Path(recipe.out), resume=False)
    with pytest.raises(lk.OutputError):
        run_directory.lock_run_directory(recipe, Path(recipe.out), resume=True)
    del place
    run_directory.lock_run_directory(recipe, Path(recipe.out), resume=True).release()


def test_where_nothing_can_be_written_there_is_a_sentence(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(lk.OutputError, match="--out"):
        run_directory.lock_run_directory(recipe, Path("/proc/lorakin/out"), resume=False)

    def read_only(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(locks, "acquire", read_only)
    with pytest.raises(lk.OutputError):
        run_directory.lock_run_directory(recipe, Path(recipe.out), resume=False)
    assert not Path(recipe.out).parent.exists()


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The directory of a run that was begun with this recipe."""
    saved = Recipe(
        "m",
        "d.jsonl",
        str(tmp_path / "out"),
        lr=1e-3,
        steps=9,
        dtype="float32",
        method="lora+",
        settings={"ratio": 8},
    )
    write_recipe(saved, tmp_path / "out" / run_directory.RECIPE)
    return tmp_path / "out"


def written(path: Path, **settings: Any) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"lr": 0.5}, r"0\.001"),
        ({"epochs": 2}, "epochs"),
        ({"rank": 4}, "where"),
        ({"method": "dora"}, r"lora\+"),
        ({"settings": {"ratio": 4}}, "ratio"),
        ({"data": "other.jsonl"}, r"d\.jsonl"),
        ({"seed": 3}, "where"),
        ({"model": "n"}, "where"),
        ({"no_such": 3}, "no_such"),
        ({"lr": "fast"}, "number"),
    ],
)
@pytest.mark.parametrize("out_in", ["flag", "recipe"])
def test_a_recipe_that_contradicts_is_refused(
    line: dict[str, Any], said: str, out_in: str, begun: Path, tmp_path: Path
) -> None:
    given = line if out_in == "flag" else {**line, "out": str(begun)}
    with pytest.raises(lk.SettingError, match=said):
        run_directory.resumed_recipe(
            written(tmp_path / "mine.yaml", **given),
            {"out": str(begun) if out_in == "flag" else None},
        )


def test_the_same_recipe_goes_on(begun: Path, tmp_path: Path) -> None:
    """Also the one that the run was begun with, where what it left open has been filled in
    since.
    """
    saved = run_directory.resumed_recipe(None, {"out": str(begun)})
    for lines in (
        {
            "model": "m",
            "data": "d.jsonl",
            "method": "lora+",
            "settings": {"ratio": 8.0},
            "lr": "1e-3",
            "dtype": "auto",
        },
        {"steps": 9},
        {"targets": "all-linear", "labels": None},
        yaml.safe_load((begun / run_directory.RECIPE).read_text()),
    ):
        assert (
            run_directory.resumed_recipe(
                written(tmp_path / "mine.yaml", **lines), {"out": str(begun)}
            )
            == saved
        )
    with pytest.raises(lk.SettingError, match=r"0\.001"):
        run_directory.resumed_recipe(
            written(tmp_path / "mine.yaml", lr=1e-3), {"out": str(begun), "lr": 0.5}
        )


def test_on_the_command_line(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path / "mine.yaml", lr=0.5)
    assert command(["train", str(recipe), "--resume", "--out", str(begun)]) == 2
    assert "where lr is 0.001, not 0.5" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("is_first", [True, False])
def test_of_several_processes_the_first_one_looks_for_all(
    is_first: bool, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All hear what it found, or what it says against it; the others touch nothing."""
    said: list[Any] = [(Path("a"), None), (None, lk.OutputError("in use"))]
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "is_first", lambda: is_first)
    monkeypatch.setattr(processes, "agreed", lambda value: value if is_first else said.pop(0))
    held = run_directory.lock_run_directory(recipe, Path(recipe.out), resume=False)
    assert Path(recipe.out).exists() is is_first
    assert held.checkpoint == (None if is_first else Path("a"))
    with pytest.raises(lk.OutputError):
        run_directory.lock_run_directory(recipe, Path(recipe.out), resume=False)
    held.release()
    assert not Path(recipe.out).exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("target", ["empty", "nowhere"])
def test_out_that_is_a_link_is_not_written_through(
    target: str, resume: bool, recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    Path(recipe.out).parent.mkdir()
    Path(recipe.out).symlink_to(tmp_path / target)
    with pytest.raises(
        lk.OutputError, match=rf"is a link to .*{target}, which is not written through"
    ):
        run_directory.lock_run_directory(recipe, Path(recipe.out), resume)
    assert not list((tmp_path / "empty").iterdir()) and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_a_name_that_no_directory_can_have(name: str, recipe: Recipe) -> None:
    with pytest.raises(lk.OutputError):
        run_directory.lock_run_directory(recipe, Path(name), resume=False)


def test_a_pipe_in_the_place_of_the_recipe_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / run_directory.RECIPE)
    with pytest.raises(lk.SettingError, match=r"recipe\.yaml"):
        run_directory.resumed_recipe(None, {"out": str(tmp_path)})
    (tmp_path / run_directory.RECIPE).unlink()
    (tmp_path / run_directory.RECIPE).symlink_to(tmp_path / "gone")
    with pytest.raises(lk.SettingError, match=r"recipe\.yaml"):
        run_directory.resumed_recipe(None, {"out": str(tmp_path)})
