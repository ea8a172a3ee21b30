"""The directory of a result, which is written completely or not at all."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorakin.errors import LorakinError, OutputError
from lorakin.storage import locks, paths

REPORT = "export.json"
PARTIAL = re.compile(r"\.lorakin-[0-9a-f]{12}\.lock", re.ASCII)
"""The lock of a result being written; the result's directory has its name without the ending."""


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes the report of a result into its directory."""
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_directory(out: str) -> Iterator[Path]:
    """Makes a directory that becomes `out` at the end; after an error nothing is left of it.

    Directories that a killed process left next to `out` are removed.

    Raises:
        OutputError: `out` is a file or not empty, or it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with new_directory(f"{folder}/out") as partial:
    ...         write_report(partial, {"size": 1})
    ...     [path.name for path in Path(folder).rglob("*")]
    ['out', 'export.json']
    """
    target = paths.user_path(out, "--out", OutputError)
    try:
        if not out.strip():
            raise OutputError("--out is empty; give a new directory")
        if target.is_symlink():
            raise OutputError(
                f"--out {out} is a link to {target.resolve()}, and nothing is written through a "
                "link; name a new directory"
            )
        target = target.resolve()
        if target.exists() and not target.is_dir():
            raise OutputError(f"--out {out} is not a directory; choose another one, new or empty")
        if target.exists() and any(target.iterdir()):
            raise OutputError(f"--out {out} is not empty; choose another directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        lock = locks.acquire(target.parent / f".lorakin-{uuid.uuid4().hex[:12]}.lock")
        partial = lock.path.with_suffix("")
        partial.mkdir(0o700)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a name
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write to --out {out}: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        yield partial
        partial.chmod(0o755)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (OSError, SafetensorError) as error:  # how safetensors reports a full disk
        if isinstance(error, LorakinError) and not isinstance(error, OutputError):
            raise
        reason = getattr(error, "strerror", None) or str(error).replace(str(partial), out)
        raise OutputError(f"cannot write to --out {out}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Removes the results in `folder` that nobody is writing any more."""
    for path in [path for path in folder.iterdir() if PARTIAL.fullmatch(path.name)]:
        with contextlib.suppress(OSError, locks.LockTaken):
            lock = locks.acquire(path)
            if lock.is_effective:
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                lock.release()
