"""The directory of a run, `--out`: one run at a time works in it and resumes from it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

from lorakin.errors import OutputError, SettingError
from lorakin.storage import locks, paths
from lorakin.training import checkpoint_manifest, checkpoints, processes
from lorakin.training.recipe import Recipe
from lorakin.training.recipe_file import read_recipe, settings_in, without_empty
from lorakin.training.recipe_words import option_name
from lorakin.training.run_files import CHECKPOINTS, LOCK, LOG, METRICS, PICTURE, RECIPE, REQUEST

__all__ = [
    "CHECKPOINTS",
    "LOCK",
    "METRICS",
    "PICTURE",
    "RECIPE",
    "RunDirectoryLock",
    "described",
    "lock_run_directory",
    "resumed_recipe",
]


class RunDirectoryLock:
    """The lock of a run's directory: until it is released, no other run works there.

    Of several processes the first one holds the lock, for all.

    Attributes:
        checkpoint: the checkpoint that the run resumes from.
        lock: the lock, if this process has it.
        made: directories that were made for the run.
    """

    def __init__(self) -> None:
        self.checkpoint: Path | None = None
        self.lock: locks.Lock | None = None
        self.made: list[Path] = []

    def release(self) -> None:
        """Releases the directory; removes directories that were made for it and are empty."""
        if self.lock is not None:
            forget_request(self.lock.path.parent)
            self.lock.release()
        for folder in self.made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self.lock, self.made = None, []


def lock_run_directory(recipe: Recipe, out: Path, resume: bool) -> RunDirectoryLock:
    """Locks a directory for a run, once it may be used.

    Args:
        recipe: the run's.
        out: the directory.
        resume: whether the run resumes from what is there.

    Raises:
        OutputError: it holds something else, another run works there, or it cannot be written.
        SettingError: the run to resume has another recipe, or another number of processes.
        AdapterError: its last checkpoint is damaged.
    """
    directory_lock = RunDirectoryLock()

    def look() -> Path | None:
        _check_place(out)
        if not (out / LOCK).exists():
            # Before anything is touched.
            _check_contents(out, resume)
        try:
            _acquire(directory_lock, out)
            _check_contents(out, resume)
            return _checkpoint(recipe, out) if resume else None
        except BaseException:
            directory_lock.release()
            raise

    directory_lock.checkpoint = processes.by_first(look)
    return directory_lock


def _check_place(out: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            out.lstat()
        if out.is_symlink():
            raise OutputError(
                f"--out {out} is a link to {os.readlink(out)}, which is not written through; name "
                "a new directory"
            )
        if out.exists() and not out.is_dir():
            raise OutputError(f"--out {out} is a file, expected a directory")
        existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    except (OSError, ValueError) as error:  # too long a name, or a zero byte in it
        raise (
            error
            if isinstance(error, OutputError)
            else OutputError(f"--out {out} cannot be made: {error}")
        ) from None
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(
            f"--out {out} cannot be made: {existing} is not a directory that may be written to"
        )


def _check_contents(out: Path, resume: bool) -> None:
    """Checks that the directory is empty or, for a run that resumes, a run's."""
    if not out.is_dir() or all(path.name in (LOCK, LOG, REQUEST) for path in out.iterdir()):
        return
    if not resume:
        raise OutputError(
            f"--out {out} is not empty; choose another directory, or continue its run with --resume"
        )
    if not (out / RECIPE).is_file():
        raise OutputError(f"--resume: {out} has no {RECIPE}, so there is no run to resume")
    if link := next(checkpoints.links(out / CHECKPOINTS), None):
        raise OutputError(
            f"--resume: {link} is a link to {os.readlink(link)}, which is not written through; "
            "remove it"
        )


def _acquire(directory_lock: RunDirectoryLock, out: Path) -> None:
    directory_lock.made = [
        folder for folder in (out, *out.absolute().parents) if not folder.exists()
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Whoever looks whether a lock is held holds it for a moment.
        directory_lock.lock = locks.acquire(out / LOCK, wait=0.1)
        forget_request(out)  # that of a run which was killed
    except locks.LockTaken as error:
        raise OutputError(
            f"--out {out} is in use: {error} is at work there. Wait until it has ended, or choose "
            "another directory"
        ) from None
    except OSError as error:
        raise OutputError(f"--out {out} cannot be written: {error.strerror or error}") from error


def _checkpoint(recipe: Recipe, out: Path) -> Path | None:
    """Returns the checkpoint to resume from, which is whole and of this run; None without one."""
    folder = checkpoints.last_checkpoint(out / CHECKPOINTS)
    checkpoints.check_place(out / CHECKPOINTS, checkpoints.step_of(folder))
    if folder is None:
        return None
    manifest = checkpoint_manifest.verified(folder)
    manifest.check_run({checkpoint_manifest.RECIPE: described(recipe)})
    if manifest.processes != processes.count():
        raise SettingError(
            f"--resume: {out} was trained by {manifest.processes} processes, and there are "
            f"{processes.count()} now, which would see other rows; start {manifest.processes}, "
            "or start over in another --out"
        )
    return folder


def forget_request(out: Path) -> None:
    """Removes what was asked of a run that has ended."""
    with contextlib.suppress(OSError):  # a directory that is gone, or read-only since
        (out / REQUEST).unlink()


def described(recipe: Recipe) -> dict[str, Any]:
    """Returns the settings that identify a run: all but where it lies."""
    return {name: value for name, value in dataclasses.asdict(recipe).items() if name != "out"}


def resumed_recipe(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """Returns the recipe of the run to resume, which neither flags nor `path` contradict.

    Args:
        path: a recipe that the user gave, or None.
        flags: what the user gave on the command line; the run's directory is its `out`.

    Raises:
        SettingError: there is no such run, or a flag or a line of the recipe says something else.
    """
    given = settings_in(path) if path is not None else {}
    out = str(flags.get("out") or given.get("out") or "")
    saved = paths.user_path(out, "--out") / RECIPE
    if out and not saved.is_file() and (saved.exists() or saved.is_symlink()):
        raise SettingError(
            f"--resume: {saved} is not a file, so there is no recipe to resume with; put the run's "
            "own back"
        )
    if not out or not saved.is_file():
        return read_recipe(path, flags)
    given |= without_empty(flags) | {"out": out}
    recipe, asked = read_recipe(saved, {"out": out}), read_recipe(saved, given)
    for name in given:
        value = getattr(asked, name)
        if value not in checkpoint_manifest.UNDECIDED and value != getattr(recipe, name):
            called = option_name(name) if name in flags else name
            raise SettingError(
                f"--resume continues {saved}, where {called} is {getattr(recipe, name)!r}, not "
                f"{getattr(asked, name)!r}; to change it, start over in another --out"
            )
    return recipe
