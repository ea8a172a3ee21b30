"""The checkpoints in a run's directory: begun, found, and deleted in the order of their steps.

What a kill leaves has a manifest or is empty, since the manifest is written first and deleted last.
So a directory with parts and without a manifest belongs to somebody else, or its manifest was lost.
Nothing is written into it, and it stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorakin.errors import OutputError
from lorakin.training.checkpoint_manifest import (
    MANIFEST,
    is_whole,
    manifest_in,
    number_of,
    numbered,
    unseal,
    verified,
)

STATE = "trainer_state.json"
"""The Trainer's own state in a checkpoint."""


def begin(folder: Path) -> None:
    """Marks a checkpoint as being saved, so that a cut-off one is known; empties it.

    Raises:
        OutputError: it is a link, holds what no save left, or cannot be written.
    """
    _check_ours(folder)
    unseal(folder)
    _empty(folder)


def check_place(folder: Path, after: int = 0) -> None:
    """Checks that the checkpoints of later steps can be written into `folder`.

    Args:
        folder: the directory of checkpoints.
        after: the step after which they are.

    Raises:
        OutputError: a link, or a checkpoint's directory with what no save left.
    """
    if folder.is_symlink():
        raise _is_a_link(folder)
    for number, path in numbered(folder):
        if number > after:
            _check_ours(path)


def links(folder: Path) -> Iterator[Path]:
    """Yields the links that `folder` is or holds."""
    if folder.is_symlink():
        yield folder
        return
    for place, folders, files in os.walk(folder):
        paths = (Path(place, name) for name in sorted((*folders, *files)))
        yield from (path for path in paths if path.is_symlink())


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint of the last step that was saved to its end, None if there is none.

    `verified` tells whether its parts are sound.

    Raises:
        AdapterError: one of a later step has no manifest, or a damaged one.
    """
    for _, path in reversed(numbered(folder)):
        manifest = manifest_in(path)
        if manifest is None and not _is_empty(path):
            # It raises, and says what is wrong.
            verified(path)
        if manifest is not None and manifest["is_whole"]:
            return path
    return None


def best_of(checkpoint: Path) -> Path | None:
    """Returns the checkpoint that was the best one when `checkpoint` was saved.

    None if the run does not look for one, or has not evaluated yet.
    """
    try:
        recorded = json.loads((checkpoint / STATE).read_text())["best_model_checkpoint"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return checkpoint.parent / Path(recorded).name if isinstance(recorded, str) else None


def rotate(folder: Path, step: int, limit: int | None, best: str | None) -> None:
    """Deletes old checkpoints, so that `limit` of those up to `step` are left.

    Those that were cut off go first, then those of the lowest steps; a clock may go back, so the
    files' times do not count. The one of this step and the best stay, and so do those that were the
    best when one that stays was saved, and what has no manifest.

    Args:
        folder: the directory of checkpoints.
        step: the step that was just saved.
        limit: how many are kept; None or 0 for all.
        best: the path of the Trainer's best checkpoint, if it has one.
    """
    if not limit or limit < 0:
        return
    ours = [
        (number, path) for number, path in numbered(folder) if number <= step and _is_ours(path)
    ]
    best_name = Path(best).name if best is not None else None
    spare = [path for number, path in ours if number != step and path.name != best_name]
    spare.sort(key=lambda path: (is_whole(path), number_of(path)))
    go = spare[: max(0, len(ours) - limit)]
    needed = {best_of(path) for _, path in ours if path not in go}
    for path in go:
        # The run can continue if this fails.
        with contextlib.suppress(OSError):
            if path not in needed:
                # Otherwise what a kill leaves would look damaged.
                unseal(path)
                _empty(path)
                shutil.rmtree(path)


def step_of(checkpoint: str | Path | None) -> int:
    """Returns the step in a checkpoint's name, 0 without one.

    >>> step_of("out/checkpoint-20"), step_of(None)
    (20, 0)
    """
    return number_of(Path(checkpoint)) or 0 if checkpoint is not None else 0


def _check_ours(folder: Path) -> None:
    if link := next(links(folder), None):
        raise _is_a_link(link)
    if folder.is_dir() and not _is_ours(folder) and not _is_empty(folder):
        raise OutputError(
            f"{folder} would be written into, but it has no {MANIFEST}, so it is not known to be a "
            "checkpoint of lorakin's: move it away, or choose another directory"
        )


def _is_a_link(link: Path) -> OutputError:
    return OutputError(
        f"{link} is a link to {os.readlink(link)}, which is not written through; remove it"
    )


def _empty(folder: Path) -> None:
    """Deletes what is in a checkpoint, except its manifest and hidden files; follows no link."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MANIFEST and not path.name.startswith("."):
            path.unlink()


def _is_ours(folder: Path) -> bool:
    """Returns whether a directory has a manifest, sound or not."""
    return not folder.is_symlink() and (folder / MANIFEST).is_file()


def _is_empty(folder: Path) -> bool:
    """Returns whether it has hidden files only, such as a manifest being written."""
    return all(path.name.startswith(".") for path in folder.iterdir())
