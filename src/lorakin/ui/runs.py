"""The runs in a folder, as their directories show them: training runs and comparisons."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

from lorakin.errors import LorakinError, SettingError, StateError
from lorakin.storage import locks, paths
from lorakin.training.followed_metrics import FollowedMetrics
from lorakin.training.recipe_file import settings_in
from lorakin.training.run_files import CHECKPOINTS, LOCK, LOG, METRICS, RECIPE

RUNNING, STARTING, DONE = "running", "starting", "done"
PAUSED, INTERRUPTED, FAILED = "paused", "interrupted", "failed"
TRAINING, COMPARISON = "training", "comparison"
ADAPTER, COMPARED, RESULTS, EXPORTED = (
    "adapter_config.json",
    "comparison.yaml",
    "results.jsonl",
    "export.json",
)
PROMPT = "$ lorakin "
"""How the line of a log begins that says which command wrote the rest."""
ENDED, RESUMABLE = "ended  ", "resume with: "
"""How the line begins that says how training ended, and what the line of a paused run holds."""
MOST_OF_A_LOG = 20_000
"""Characters at the end of a log that are read."""


@dataclasses.dataclass(frozen=True)
class ListedRun:
    """A run as its directory shows it.

    Attributes:
        name: the directory's name.
        path: the directory.
        kind: `TRAINING` or `COMPARISON`.
        state: `RUNNING`, `STARTING`, `DONE`, `PAUSED`, `INTERRUPTED` or `FAILED`.
        reason: why it failed, or how it ended.
        method: what is trained; "" if that is not known yet.
        step: the last optimizer step in its metrics.
        loss: the last training loss; None without one.
        held_out: the last held-out loss; None without one.
    """

    name: str
    path: Path
    kind: str
    state: str
    reason: str = ""
    method: str = ""
    step: int = 0
    loss: float | None = None
    held_out: float | None = None


def place(folder: Path, name: str) -> Path:
    """Returns the directory `name` in a folder of runs.

    >>> place(Path("runs"), "first").as_posix()
    'runs/first'

    Raises:
        SettingError: the name would lead elsewhere, or is empty or hidden.
    """
    name = name.strip()
    if not name or name.startswith((".", "-", "~")) or any(mark in name for mark in "/\\\n\0"):
        raise SettingError(
            f"--out {name!r} is not the name of a directory in {folder.resolve()}; give a name "
            "such as adapter, without slashes and without a dot at its beginning"
        )
    return folder / paths.user_path(name, "--out")


def chosen(folder: Path, name: str | None) -> Path:
    """Returns the directory of the run that is chosen.

    Raises:
        StateError: none is.
    """
    if not name:
        raise StateError("no run is chosen; choose one, or start one first")
    return place(folder, name)


def listed(folder: Path) -> list[ListedRun]:
    """Returns the runs in a folder, the latest first."""
    found = [path for path in _entries(folder) if _is_run(path)]
    found.sort(key=lambda path: (-_changed(path), path.name))
    return [read(path) for path in found]


def read(path: Path) -> ListedRun:
    """Returns a run as its directory shows it now."""
    log = log_of(path / LOG)
    is_comparison = (path / COMPARED).is_file() or f"{PROMPT}compare " in log
    kind = COMPARISON if is_comparison else TRAINING
    state, reason = _state(path, kind, log)
    row: dict[str, Any] = {}
    if kind == TRAINING:
        try:
            for line in metrics_rows(path):
                row |= line
        except LorakinError as error:
            reason = reason or str(error)
    method = str(_settings(path / RECIPE).get("method", "")) if kind == TRAINING else ""
    return ListedRun(
        path.name, path, kind, state, reason, method, int(row.get("step", 0)), row.get("loss"),
        row.get("eval_loss"),
    )  # fmt: skip


def metrics_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics so far.

    Raises:
        DataError: its file holds something else.
    """
    return _followed(path / METRICS).rows()


@functools.lru_cache(maxsize=256)
def _followed(path: Path) -> FollowedMetrics:
    return FollowedMetrics(path)


def adapters(folder: Path) -> list[tuple[str, str]]:
    """Returns the adapters of the runs in a folder: (what it is, its directory).

    A run that has none yet is represented by its last whole checkpoint, which is one.
    """
    from lorakin.training.checkpoints import last_checkpoint  # which imports torch

    found: list[tuple[str, str]] = []
    for run in (run for run in listed(folder) if run.kind == TRAINING):
        if (run.path / ADAPTER).is_file():
            found.append((run.name, str(run.path)))
            continue
        with contextlib.suppress(LorakinError):  # a damaged checkpoint is no adapter
            if (last := last_checkpoint(run.path / CHECKPOINTS)) is not None:
                found.append((f"{run.name}, {last.name}", str(last)))
    return found


def log_of(path: Path) -> str:
    """Returns the end of a log; "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - MOST_OF_A_LOG))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def error_in(log: str) -> str:
    r"""Returns the error with which the last command of a log ended; "" if it did not.

    >>> error_in("$ lorakin train\nerror: there is no row\n")
    'there is no row'
    """
    last = last_command(log)
    _, is_error, text = ("\n" + last).rpartition("\nerror: ")
    if is_error:
        return text.strip()
    if "Traceback (most recent call last)" in last:
        return last.strip().splitlines()[-1]
    return ""


def last_command(log: str) -> str:
    r"""Returns the last command of a log, and what it printed.

    >>> last_command("$ lorakin train\nno\n$ lorakin train --resume\nyes\n")
    'train --resume\nyes\n'
    """
    return ("\n" + log).rpartition("\n" + PROMPT)[2]


def ending_in(log: str) -> str:
    r"""Returns how the last command of a log says that its training ended; "" for the usual end.

    >>> ending_in("$ lorakin train\nended  stopped after step 3 of 9\n")
    'stopped after step 3 of 9'
    """
    lines = (line for line in last_command(log).splitlines() if line.startswith(ENDED))
    return next((line.removeprefix(ENDED).strip() for line in lines), "")


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return []


def _is_run(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir() or (path / EXPORTED).exists():
        return False
    return any((path / name).is_file() for name in (RECIPE, ADAPTER, COMPARED, LOG, LOCK))


def _changed(path: Path) -> float:
    names = (RECIPE, ADAPTER, COMPARED, LOG, METRICS, RESULTS)
    return max((p.stat().st_mtime for p in (path / n for n in names) if p.is_file()), default=0.0)


def _state(path: Path, kind: str, log: str) -> tuple[str, str]:
    """Returns the state of a run, and why it failed or how it ended."""
    if locks.holder(path / LOCK) is not None:
        return RUNNING, ""
    if locks.holder(path / LOG) is not None:
        # Its lock is not taken yet, or no longer: it says something in between.
        has_said = "\n" in last_command(log).rstrip("\n")
        return (RUNNING if has_said else STARTING), ""
    report = path / ("report.html" if kind == COMPARISON else ADAPTER)
    error = error_in(log)
    is_later = report.is_file() and (
        not error or report.stat().st_mtime > (path / LOG).stat().st_mtime
    )
    if error and not is_later:
        return FAILED, error
    if is_later:
        return DONE, ending_in(log)
    return (PAUSED if RESUMABLE in last_command(log) else INTERRUPTED), ""


def _settings(path: Path) -> dict[str, Any]:
    try:
        return settings_in(path)
    except LorakinError:
        return {}
