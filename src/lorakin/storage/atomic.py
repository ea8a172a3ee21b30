"""Several files of one directory, replaced all or none, also when the process is killed in between.

All are written under other names. Then a record of what is to be renamed to what is put in place; from that moment the new
files count: whoever reads or writes there next finishes the renaming if it was cut off.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

from lorakin.errors import AdapterError, OutputError

RECORD = ".lorakin-save.json"


def write(path: Path, files: Mapping[str, bytes]) -> None:
    """Put `files` (name → content) into the directory `path`, made if need be, all or none.

    Raises:
        OutputError: nothing was changed in `path`, whose files are as they were.
    """
    temporary = {name: f".{name}.{uuid.uuid4().hex[:8]}.tmp" for name in files}
    record = {RECORD: f".{RECORD}.{uuid.uuid4().hex[:8]}.tmp"}
    try:
        path.mkdir(parents=True, exist_ok=True)
        finish(path)
        if taken := [name for name in files if (path / name).is_dir()]:
            raise IsADirectoryError(errno.EISDIR, f"{taken[0]} is a directory")
        _remove_leftovers(path, [*files, RECORD])
        for name, content in files.items():
            _write_through(path / temporary[name], content)
        if len(files) > 1:
            _write_through(path / record[RECORD], json.dumps(temporary).encode())
            _rename(path, record)
        try:
            _rename(path, temporary)
        except KeyboardInterrupt:
            _rename(path, temporary)
            raise
        finally:
            finish(path)
    except OSError as error:
        begun = (path / RECORD).exists()
        state = "the new files lie there and will be put in place when it is read" if begun else "what was there is unchanged"
        raise OutputError(f"cannot write to {path}: {error.strerror or error}; {state}") from error
    finally:
        if not (path / RECORD).exists():
            for leftover in (*temporary.values(), *record.values()):
                with contextlib.suppress(OSError):
                    (path / leftover).unlink()


def finish(path: Path) -> None:
    """Finish the renaming that a killed process left behind in the directory `path`, if there is any.

    Raises:
        AdapterError: its record names files that no save would.
        OSError: it cannot be finished.
    """
    record = path / RECORD
    if not record.is_file():
        return
    try:
        temporary = dict(json.loads(record.read_text(encoding="utf-8")))
        right = all(_is_of_a_save(name, source) for name, source in temporary.items())
    except (ValueError, TypeError):
        right = False
    if not right:
        raise AdapterError(f"{record} is no record of a save; remove it")
    _rename(path, temporary)
    record.unlink(missing_ok=True)


def _is_of_a_save(name: object, source: object) -> bool:
    if not isinstance(name, str) or not isinstance(source, str) or name != os.path.basename(name) or name[:1] in ("", "."):
        return False
    return _is_temporary(source, name)


def _is_temporary(source: str, name: str) -> bool:
    return re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.tmp", source) is not None


def _write_through(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rename(path: Path, temporary: Mapping[str, str]) -> None:
    for name, source in temporary.items():
        if (path / source).exists():
            os.replace(path / source, path / name)


def _remove_leftovers(path: Path, names: list[str]) -> None:
    """Remove what killed saves of these files left."""
    for leftover in path.glob(".*.tmp"):
        if any(_is_temporary(leftover.name, name) for name in names):
            leftover.unlink(missing_ok=True)
