"""Run directories as the page lists them, whatever made them; jobs; uploads."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shlex
import shutil
import time
from pathlib import Path

import pytest

from lorakin.errors import OutputError, SettingError, StateError
from lorakin.storage import locks
from lorakin.ui import curves, jobs, runs, uploads


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run that was interrupted."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("method: dora\n")
    (folder / "metrics.jsonl").write_text(
        '{"step": 0, "eval_loss": 2.5}\n{"step": 3, "loss": 2.0}\n{"step": 4, "lo'
    )
    return folder


def test_a_run_of_the_command_line_is_listed(run: Path) -> None:
    (found,) = runs.listed(run.parent)
    assert (found.name, found.state, found.method) == ("adapter", runs.INTERRUPTED, "dora")
    assert (found.step, found.loss, found.held_out) == (3, 2.0, 2.5)


def test_a_run_whose_lock_is_held_runs(run: Path) -> None:
    with locks.locked(run / ".lock"):
        assert runs.read(run).state == runs.RUNNING
    assert runs.read(run).state == runs.INTERRUPTED


def test_who_looks_at_a_lock_keeps_nobody_from_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert locks.holder(path) is None and not path.exists()
    with locks.locked(path):
        assert locks.holder(path) == f"process {os.getpid()} on {os.uname().nodename}"
    path.write_text("process 1 on another")  # what a killed process leaves
    assert locks.holder(path) is None and path.exists()


def test_a_run_is_done_failed_or_done_after_it_failed(run: Path) -> None:
    log = run / "log.txt"
    log.write_text("$ lorakin train\nerror: first\n$ lorakin train --resume\nerror: no\nroom\n")
    assert (runs.read(run).state, runs.read(run).reason) == (runs.FAILED, "no\nroom")
    (run / "adapter_config.json").write_text("{}")
    os.utime(log, (1, 1))
    assert runs.read(run).state == runs.DONE


def test_a_run_that_was_paused_and_one_that_was_stopped_say_so(run: Path) -> None:
    log = run / "log.txt"
    log.write_text("$ lorakin train\nstep 3/9\nstopped; resume with: lorakin train --resume\n")
    assert runs.read(run).state == runs.PAUSED
    log.write_text(log.read_text() + "$ lorakin train --resume\nended  stopped after step 4 of 9\n")
    (run / "adapter_config.json").write_text("{}")
    assert (runs.read(run).state, runs.read(run).reason) == (runs.DONE, "stopped after step 4 of 9")


def test_a_process_that_has_said_something_runs(run: Path) -> None:
    log = run / "log.txt"
    log.write_text("$ lorakin train\n")
    with log.open("r+") as file:
        locks.hold(file.fileno())
        assert runs.read(run).state == runs.STARTING
        log.write_text("$ lorakin train\nadapter  adapter\n")
        assert runs.read(run).state == runs.RUNNING


def test_a_damaged_file_is_said_and_hides_no_run(run: Path) -> None:
    (run / "metrics.jsonl").write_text("[]\n")
    (found,) = runs.listed(run.parent)
    assert "is not a row of metrics" in found.reason


def test_two_runs_are_drawn_in_one_chart(run: Path) -> None:
    other = run.parent / "other"
    other.mkdir()
    rows = [{"step": n, "loss": 1 / n, "learning_rate": 1e-3} for n in range(1, 2501)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses, rates, *_ = (
        list(csv.DictReader(io.StringIO(chart.data.values)))
        for chart in curves.charts_of([run, other])
    )
    assert [point for point in losses if point["run"] == "adapter"] == [
        {"step": "3", "value": "2.0", "run": "adapter", "of": "training"},
        {"step": "0", "value": "2.5", "run": "adapter", "of": "held out"},
    ]
    steps = [int(point["step"]) for point in rates]
    assert {point["run"] for point in rates} == {"other"} and (steps[0], steps[-1]) == (1, 2500)
    assert len(steps) <= curves.MOST_POINTS + 1


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "-x", "~", ".hidden", "a\nb"])
def test_a_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingError, match="is not the name of a directory"):
        runs.place(tmp_path, name)


def until(condition: object) -> None:
    end = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_job_is_known_by_its_log(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    words = ["train", "--data", "my rows.jsonl", "--out", str(folder)]
    jobs.start(words, folder / "log.txt")
    assert runs.read(folder).state == runs.STARTING
    with pytest.raises(OutputError, match="is in use"):
        jobs.start(words, folder / "log.txt")
    until(lambda: not jobs.lives(folder / "log.txt"))
    found = runs.read(folder)
    assert found.state == runs.FAILED and "--model is missing" in found.reason
    first, *_ = (folder / "log.txt").read_text().splitlines()
    assert shlex.split(first.removeprefix(runs.PROMPT)) == words


def test_only_a_run_that_runs_is_paused(run: Path) -> None:
    with pytest.raises(StateError, match="nothing runs"):
        jobs.interrupt(run)
    (run / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    with pytest.raises(StateError, match="nothing runs"):
        jobs.interrupt(run)


def test_uploads_are_kept_once_and_never_replaced(tmp_path: Path) -> None:
    source = tmp_path / "in" / "my rows.jsonl.gz"
    source.parent.mkdir()
    source.write_bytes(b"1")
    first = uploads.keep(source, tmp_path)
    assert first == tmp_path / "uploads" / "my_rows.jsonl.gz" == uploads.keep(source, tmp_path)
    source.write_bytes(b"2")
    assert uploads.keep(source, tmp_path).name == "my_rows-2.jsonl.gz"
    assert first.read_bytes() == b"1"


def test_a_full_disk_leaves_no_half_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"1")

    def half(_: Path, to: Path) -> None:
        Path(to).write_bytes(b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", half)
    with pytest.raises(OutputError, match="the disk is full"):
        uploads.keep(source, tmp_path)
    assert list((tmp_path / "uploads").iterdir()) == []
