"""The manifest of a checkpoint: it binds the checkpoint's parts to each other and to their run.

It is begun before the first part is written, and written last: step, run, versions, and the SHA-256
of every part. A checkpoint whose manifest was only begun was cut off. One whose parts are not those
of its manifest is damaged, and no run is resumed from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers

import lorakin
from lorakin.errors import AdapterError, DataError, LorakinWarning, SettingError, some
from lorakin.storage import atomic
from lorakin.storage.card import CARD
from lorakin.storage.lorakin_part import CHECKSUM, checksum

MANIFEST, FORMAT = "lorakin-checkpoint.json", 1
FIELD_TYPES = {
    "is_whole": bool,
    "step": int,
    "processes": int,
    "run": dict,
    "versions": dict,
    "parts": dict,
}
"""The keys of a whole checkpoint's manifest, and the types of their values."""
RECIPE, ROWS = "recipe", "rows"
"""Keys under which a run says its settings, and the digest of its tokenised rows."""
UNDECIDED = (None, "auto")
"""Values of a recipe that leave the choice to lorakin, so they contradict nothing."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint whose parts are all those that were saved."""

    folder: Path
    step: int
    processes: int
    run: Mapping[str, Any]
    versions: Mapping[str, str]

    def check_run(self, run: Mapping[str, Any]) -> None:
        """Checks that the checkpoint belongs to a run, as far as both say what they are.

        Args:
            run: the run's settings under `RECIPE`, the digest of its rows under `ROWS`.

        Raises:
            SettingError: another recipe; names the first setting that differs.
            DataError: other rows.
        """
        if RECIPE in run and RECIPE not in self.run:
            raise SettingError(
                f"{self.folder} is not a checkpoint of lorakin train, so it cannot be resumed here"
            )
        saved, present = self.run.get(RECIPE, {}), json.loads(json.dumps(run.get(RECIPE, {})))
        for name in [name for name in present if name in saved]:
            if present[name] not in UNDECIDED and present[name] != saved[name]:
                raise SettingError(
                    f"{self.folder} was made with {name}={saved[name]!r}, and the recipe says "
                    f"{present[name]!r}, so it is of another run; put the recipe back as it was, "
                    "or start over in another --out"
                )
        if self.run.get(ROWS, run.get(ROWS)) != run.get(ROWS, self.run.get(ROWS)):
            raise DataError(
                f"{self.folder} was made on other rows, or they are tokenised in another way now; "
                "put them back, or start over"
            )

    def check_versions(self) -> None:
        """Warns if the run was begun with other versions: its numbers may come out differently."""
        changed = [
            f"{name} {self.versions.get(name)}, now {version}"
            for name, version in versions().items()
            if self.versions.get(name) != version
        ]
        if changed:
            warnings.warn(
                f"{self.folder} was made by {'; '.join(changed)}. Training is resumed, but "
                "its result may differ from that of the uninterrupted run",
                LorakinWarning,
                stacklevel=2,
            )


def versions() -> dict[str, str]:
    """Returns the versions of the software on which a run's numbers depend."""
    return {
        "lorakin": lorakin.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def unseal(folder: Path) -> None:
    """Writes a manifest that says that the checkpoint in `folder` is not whole."""
    _write(folder, {"format": FORMAT, "is_whole": False})


def seal(folder: Path, step: int, processes: int, run: Mapping[str, Any]) -> None:
    """Writes the manifest of a checkpoint, once every process has written its parts.

    Args:
        folder: the checkpoint.
        step: the optimizer steps that were taken.
        processes: how many processes train.
        run: what the run says of itself; see `Manifest.check_run`.
    """
    manifest = {
        "format": FORMAT,
        "is_whole": True,
        "step": step,
        "processes": processes,
        "run": dict(run),
        "versions": versions(),
    }
    digests = {name: _digest(folder / name) for name in _parts(folder)}
    _write(folder, {**manifest, "parts": digests})


def verified(folder: Path) -> Manifest:
    """Returns the manifest of a checkpoint whose parts are all as they were saved.

    Raises:
        AdapterError: it has none, it was cut off, or a part is missing, another, or was not saved
            with it. Says what to do.
    """
    manifest = manifest_in(folder)
    if manifest is None:
        raise AdapterError(
            f"{folder} has no {MANIFEST}: an earlier lorakin made it, or it was lost. Nothing "
            "tells whether its parts belong together, so training cannot be resumed from it. "
            f"{_instead(folder)}"
        )
    if not manifest["is_whole"]:
        raise AdapterError(f"{folder} is not whole: its save was cut off. {_instead(folder)}")
    step = manifest["step"]
    if (number := number_of(folder)) not in (None, step):
        raise AdapterError(
            f"{folder} is the checkpoint of step {step}, not {number}. {_instead(folder)}"
        )
    for name, digest in manifest["parts"].items():
        part, pure = folder / name, PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise _damaged(folder, f"its {MANIFEST} names a part outside of it ({name[:80]})")
        if not part.is_file():
            raise _damaged(folder, f"{name} is missing")
        if _digest(part) != digest:
            raise _damaged(folder, f"{name} is not the one that was saved in it")
    # The Trainer might load a file that was not saved.
    if unknown := [name for name in _parts(folder) if name not in manifest["parts"]]:
        raise AdapterError(
            f"{folder} holds {some(unknown)}, which was not saved in it. "
            "To resume from it, take that out"
        )
    return Manifest(folder, step, manifest["processes"], manifest["run"], manifest["versions"])


def manifest_in(folder: Path) -> dict[str, Any] | None:
    """Returns what a checkpoint's manifest says, None if it has none. Its parts are not checked.

    Raises:
        AdapterError: the manifest is damaged, or of a later version.
    """
    try:
        content = atomic.read(folder, [MANIFEST]).get(MANIFEST)
        manifest = None if content is None else dict(json.loads(content))
    except (ValueError, TypeError, RecursionError):
        raise _damaged(folder, f"its {MANIFEST} cannot be read") from None
    if manifest is None:
        return None
    if manifest.get(CHECKSUM) != checksum(manifest):
        raise _damaged(folder, f"its {MANIFEST} was edited or is corrupted")
    if manifest.get("format") != FORMAT:
        raise AdapterError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r}, this version reads {FORMAT}; "
            "update lorakin"
        )
    has_all = all(isinstance(manifest.get(key), kind) for key, kind in FIELD_TYPES.items())
    if manifest.get("is_whole") is not False and not has_all:
        raise _damaged(folder, f"its {MANIFEST} does not say what a manifest says")
    return manifest


def is_whole(folder: Path) -> bool:
    """Returns whether a checkpoint was saved to its end, as its manifest says."""
    try:
        manifest = manifest_in(folder)
    except AdapterError:
        return False
    return manifest is not None and bool(manifest["is_whole"])


def number_of(folder: Path) -> int | None:
    """Returns the step in a checkpoint's name, None if it is not such a name.

    >>> number_of(Path("out/checkpoint-20"))
    20
    """
    match = re.fullmatch(r"checkpoint-(\d{1,15})", folder.name, re.ASCII)
    return int(match[1]) if match else None


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """Returns the checkpoints in `folder` with their steps, in the order of the steps."""
    paths = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    pairs = [(number_of(path), path) for path in paths]
    return sorted((number, path) for number, path in pairs if number is not None)


def _write(folder: Path, manifest: Mapping[str, Any]) -> None:
    content = json.dumps({**manifest, CHECKSUM: checksum(manifest)}, indent=1) + "\n"
    atomic.write(folder, {MANIFEST: content.encode()})


def _damaged(folder: Path, how: str) -> AdapterError:
    return AdapterError(
        f"{folder} is damaged: {how}. Training cannot be resumed from it. {_instead(folder)}"
    )


def _instead(folder: Path) -> str:
    """Says what to do without this checkpoint."""
    before = number_of(folder) or 0
    older = [path for number, path in numbered(folder.parent) if path != folder and number < before]
    if whole := [path for path in older if is_whole(path)]:
        return f"To resume from {whole[-1].name}, delete {folder}"
    return "There is no older one that is whole: delete it to begin again, or start over elsewhere"


def _parts(folder: Path) -> list[str]:
    """Returns the files of a checkpoint, except the model card, which anybody may edit."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    own = (MANIFEST, CARD)
    return sorted(f.as_posix() for f in files if f.name not in own and not f.name.startswith("."))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
