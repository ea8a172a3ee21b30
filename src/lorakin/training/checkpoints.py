"""A Trainer's checkpoint as one thing: its parts, and a manifest that binds them to each other and to their run.

The manifest is begun before the first part is written, and written last: step, run, versions, and the SHA-256 of every part.
A checkpoint whose manifest was only begun was cut off, and is passed over. One whose parts are not those is damaged, and
refused: which of its numbers are right, nobody can tell. What a kill leaves has a manifest or is empty, for it is deleted
last, too; so parts without one are of somebody else, or it was lost. Nothing is written into them, and they stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers

import lorakin
from lorakin.errors import AdapterError, DataError, LorakinWarning, OutputError, SettingError, some
from lorakin.storage import atomic
from lorakin.storage.card import CARD
from lorakin.storage.own_part import CHECKSUM, checksum

MANIFEST, FORMAT, STATE = "lorakin-checkpoint.json", 1, "trainer_state.json"
FORM = {
    "is_whole": bool,
    "step": int,
    "processes": int,
    "run": dict,
    "versions": dict,
    "parts": dict,
}
RECIPE, ROWS = "recipe", "rows"
"""What a run says of itself: its settings by name, and the digest of the rows as the model sees them."""
OPEN = (None, "auto")
"""Values of a recipe that leave the choice to lorakin, so that they contradict nothing."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint, once all of its parts were seen to be those that were saved."""

    folder: Path
    step: int
    processes: int
    run: Mapping[str, Any]
    versions: Mapping[str, str]

    def check_run(self, run: Mapping[str, Any]) -> None:
        """See that it is of the run that says `run` of itself, as far as both say.

        Raises:
            SettingError: another recipe, which names the first setting that differs.
            DataError: other rows.
        """
        if RECIPE in run and RECIPE not in self.run:
            raise SettingError(
                f"{self.folder} is no checkpoint of lorakin train, so it cannot be gone on with here"
            )
        then, now = self.run.get(RECIPE, {}), json.loads(json.dumps(run.get(RECIPE, {})))
        for name in [name for name in now if name in then]:
            if now[name] not in OPEN and now[name] != then[name]:
                raise SettingError(
                    f"{self.folder} was made with {name}={then[name]!r}, and the recipe says {now[name]!r}, so it is of "
                    "another run; put the recipe back as it was, or start anew in another --out"
                )
        if self.run.get(ROWS, run.get(ROWS)) != run.get(ROWS, self.run.get(ROWS)):
            raise DataError(
                f"{self.folder} was made on other rows, or they are tokenised in another way now; put them back, or start anew"
            )

    def check_versions(self) -> None:
        """Warn if other software goes on than began: the numbers may come out differently then, in the last bits or more."""
        if changed := [
            f"{name} {then}, now {now}"
            for name, now in versions().items()
            if (then := self.versions.get(name)) != now
        ]:
            warnings.warn(
                f"{self.folder} was made by {'; '.join(changed)}. Training goes on, but what comes out need not be what the "
                "uninterrupted run would have come to",
                LorakinWarning,
                stacklevel=2,
            )


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    return {
        "lorakin": lorakin.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def begin(folder: Path) -> None:
    """Say that a save into `folder` is under way, so that one that is cut off is known. What an earlier save left goes.

    Raises:
        OutputError: it is a link, or holds what no save left; or it cannot be written.
    """
    _check_ours(folder)
    unseal(folder)
    _empty(folder)


def unseal(folder: Path) -> None:
    """Say that the checkpoint in `folder` is not whole."""
    _write(folder, {"format": FORMAT, "is_whole": False})


def check_place(folder: Path, after: int = 0) -> None:
    """See that checkpoints of steps `after` this one can be written into `folder`, and none leads out of it.

    Raises:
        OutputError: a link, or a checkpoint's directory with what no save left.
    """
    if folder.is_symlink():
        raise _is_a_link(folder)
    for number, path in _numbered(folder):
        if number > after:
            _check_ours(path)


def _check_ours(folder: Path) -> None:
    if link := next(links(folder), None):
        raise _is_a_link(link)
    if folder.is_dir() and not _is_ours(folder) and not _is_empty(folder):
        raise OutputError(
            f"{folder} would be written into, but it has no {MANIFEST}, so it is not known to be a checkpoint of lorakin's: "
            "move it away, or choose another directory"
        )


def links(folder: Path) -> Iterator[Path]:
    """The links that `folder` is or holds."""
    if folder.is_symlink():
        yield folder
        return
    for place, folders, files in os.walk(folder):
        yield from (
            path for name in sorted((*folders, *files)) if (path := Path(place, name)).is_symlink()
        )


def _is_a_link(link: Path) -> OutputError:
    return OutputError(
        f"{link} is a link to {os.readlink(link)}, which is not written through; remove it"
    )


def seal(folder: Path, step: int, processes: int, run: Mapping[str, Any]) -> None:
    """Write the manifest of the checkpoint in `folder`, once every process has written its parts."""
    said = {
        "format": FORMAT,
        "is_whole": True,
        "step": step,
        "processes": processes,
        "run": dict(run),
        "versions": versions(),
    }
    _write(folder, {**said, "parts": {name: _digest(folder / name) for name in _parts(folder)}})


def opened(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`, once every part was seen to be the one that was saved with it.

    Raises:
        AdapterError: it has none, it was cut off, or a part is missing, another, or was not saved with it; says what to do.
    """
    said = _manifest(folder)
    if said is None:
        raise AdapterError(
            f"{folder} has no {MANIFEST}: an earlier lorakin made it, or it was lost. Nothing tells whether its parts belong "
            f"together, so training does not go on from it. {_instead(folder)}"
        )
    if not said["is_whole"]:
        raise AdapterError(f"{folder} is not whole: its save was cut off. {_instead(folder)}")
    if (named := _number(folder)) not in (None, said["step"]):
        raise AdapterError(
            f"{folder} is the checkpoint of step {said['step']}, not {named}. {_instead(folder)}"
        )
    for name, digest in said["parts"].items():
        part = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise _damaged(folder, f"its {MANIFEST} names what is no part of it ({name[:80]})")
        if not part.is_file():
            raise _damaged(folder, f"{name} is missing")
        if _digest(part) != digest:
            raise _damaged(folder, f"{name} is not the one that was saved in it")
    if strange := [
        name for name in _parts(folder) if name not in said["parts"]
    ]:  # which the Trainer might load
        raise AdapterError(
            f"{folder} holds {some(strange)}, which was not saved in it. To go on from it, take that out"
        )
    return Manifest(folder, said["step"], said["processes"], said["run"], said["versions"])


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the last step in `folder` that was saved to its end, or None. Whether it is sound, `opened` says.

    Raises:
        AdapterError: one of a later step has no manifest, or a damaged one.
    """
    for _, path in reversed(_numbered(folder)):
        said = _manifest(path)
        if said is None and not _is_empty(path):
            opened(path)  # which says what is amiss
        if said is not None and said["is_whole"]:
            return path
    return None


def rotate(folder: Path, step: int, limit: int | None, best: str | None) -> None:
    """Delete the checkpoints of the lowest steps, those that were cut off first, so that `limit` up to `step` are left.

    Only what has a manifest is one. That of this step stays, and the `best`. The steps count, not the files' times: a clock
    may go back.
    """
    if not limit or limit < 0:
        return
    ours = [
        (number, path) for number, path in _numbered(folder) if number <= step and _is_ours(path)
    ]
    spare = [
        path for number, path in ours if number != step and (best is None or path != Path(best))
    ]
    spare.sort(key=lambda path: (_is_whole(path), _number(path)))
    for path in spare[: max(0, len(ours) - limit)]:
        with contextlib.suppress(OSError):  # it is not a matter of the run
            unseal(path)  # or what a kill leaves of it would look damaged
            _empty(path)
            shutil.rmtree(path)


def _empty(folder: Path) -> None:
    """Delete what is in a checkpoint but its manifest, and hidden files. Links go, and what they lead to stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MANIFEST and not path.name.startswith("."):
            path.unlink()


def _is_ours(folder: Path) -> bool:
    """Whether it has a manifest, sound or not."""
    return not folder.is_symlink() and (folder / MANIFEST).is_file()


def _is_empty(folder: Path) -> bool:
    """But for hidden files: a manifest that was being written."""
    return all(path.name.startswith(".") for path in folder.iterdir())


def _write(folder: Path, said: Mapping[str, Any]) -> None:
    content = json.dumps({**said, CHECKSUM: checksum(said)}, indent=1) + "\n"
    atomic.write(folder, {MANIFEST: content.encode()})


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest says, None if there is none.

    Raises:
        AdapterError: it is damaged, or a later version's.
    """
    try:
        content = atomic.read(folder, [MANIFEST]).get(MANIFEST)
        said = None if content is None else dict(json.loads(content))
    except (ValueError, TypeError, RecursionError):
        raise _damaged(folder, f"its {MANIFEST} cannot be read") from None
    if said is None:
        return None
    if said.get(CHECKSUM) != checksum(said):
        raise _damaged(folder, f"its {MANIFEST} was edited, or a bit of it is another")
    if said.get("format") != FORMAT:
        raise AdapterError(
            f"{folder / MANIFEST}: format {said.get('format')!r}, this version reads {FORMAT}; update lorakin"
        )
    if said.get("is_whole") is not False and not all(
        isinstance(said.get(key), kind) for key, kind in FORM.items()
    ):
        raise _damaged(folder, f"its {MANIFEST} does not say what a manifest says")
    return said


def _is_whole(folder: Path) -> bool:
    try:
        said = _manifest(folder)
    except AdapterError:
        return False
    return said is not None and bool(said["is_whole"])


def _damaged(folder: Path, how: str) -> AdapterError:
    return AdapterError(
        f"{folder} is damaged: {how}. Training does not go on from it. {_instead(folder)}"
    )


def _instead(folder: Path) -> str:
    """What to do without this checkpoint."""
    older = [
        path
        for number, path in _numbered(folder.parent)
        if path != folder and number < (_number(folder) or 0)
    ]
    if whole := [path for path in older if _is_whole(path)]:
        return f"To go on from {whole[-1].name}, delete {folder}"
    return "There is no older one that is whole: delete it to begin again, or start anew elsewhere"


def step_of(checkpoint: str | Path | None) -> int:
    """The step in a checkpoint's name, 0 without one."""
    return _number(Path(checkpoint)) or 0 if checkpoint is not None else 0


def _number(folder: Path) -> int | None:
    """The step in a checkpoint's name."""
    match = re.fullmatch(r"checkpoint-(\d{1,15})", folder.name, re.ASCII)
    return int(match[1]) if match else None


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in `folder` with their steps, in order of them."""
    found = [
        (number, path)
        for path in folder.glob("checkpoint-*")
        if (number := _number(path)) is not None and path.is_dir()
    ]
    return sorted(found)


def _parts(folder: Path) -> list[str]:
    """The files of a checkpoint, but for the model card, which anybody may edit."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        file.as_posix()
        for file in files
        if file.name not in (MANIFEST, CARD) and not file.name.startswith(".")
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
