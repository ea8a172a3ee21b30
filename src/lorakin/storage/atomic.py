"""Replaces several files of one directory, all or none, even if the process is killed in between.

All files are written under temporary names. Then a record of the renamings is put in place, and
from that moment the new files count. Writers take turns; the next one finishes renamings that were
cut off. A reader changes nothing: it looks through the record, and gets all files of one save or of
the other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, TypeVar

from lorakin.errors import AdapterError, OutputError
from lorakin.storage import locks

RECORD, LOCK = ".lorakin-save.json", ".lorakin-lock"
PATIENCE = 600.0
"""Seconds that a save waits for another process's save into the same directory."""
TRIES = 60
"""How often a reader starts again because files changed meanwhile; two seconds in all."""
READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
T = TypeVar("T")


def write(path: Path, files: Mapping[str, bytes], without: Iterable[str] = ()) -> None:
    """Writes files into a directory and removes others from it, all or none.

    Args:
        path: the directory, made if need be.
        files: name → content of the files to write.
        without: names of the files to remove.

    Raises:
        OutputError: it cannot be done. Either nothing changed in `path`, or all new files count.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with locks.locked(path / LOCK, PATIENCE):
            _write(
                path,
                files,
                [name for name in without if (path / name).exists() or (path / RECORD).exists()],
            )
    except locks.LockTaken as error:
        raise OutputError(
            f"cannot write to {path}: {error} is writing there; its files are unchanged"
        ) from None
    except OSError as error:
        is_recorded = (path / RECORD).exists()
        state = "the new files are there, and count" if is_recorded else "its files are unchanged"
        raise OutputError(f"cannot write to {path}: {error.strerror or error}; {state}") from error


def _write(path: Path, files: Mapping[str, bytes], without: Iterable[str]) -> None:
    temporary: dict[str, str | None] = {
        name: f".{name}.{uuid.uuid4().hex[:8]}.tmp" for name in files
    }
    sources = [source for source in temporary.values() if source is not None]
    temporary |= dict.fromkeys(without)
    record: dict[str, str | None] = {RECORD: f".{RECORD}.{uuid.uuid4().hex[:8]}.tmp"}
    try:
        finish(path)
        if taken := [name for name in files if (path / name).is_dir()]:
            raise IsADirectoryError(errno.EISDIR, f"{taken[0]} is a directory")
        _remove_leftovers(path, [*files, RECORD])
        for source, content in zip(sources, files.values(), strict=True):
            _write_through(path / source, content)
        if len(temporary) > 1:
            _write_through(path / str(record[RECORD]), json.dumps(temporary).encode())
            _rename(path, record)
        try:
            _rename(path, temporary)
        except KeyboardInterrupt:
            _rename(path, temporary)
            raise
        finally:
            finish(path)
    finally:
        if not (path / RECORD).exists():
            for leftover in (*sources, str(record[RECORD])):
                with contextlib.suppress(OSError):
                    (path / leftover).unlink()


def finish(path: Path) -> None:
    """Finishes the renamings that a killed process left in the directory `path`; the lock is held.

    Raises:
        AdapterError: its record names files that no save would.
        OSError: it cannot be finished.
    """
    if temporary := _recorded(path):
        _rename(path, temporary)
        (path / RECORD).unlink(missing_ok=True)


def read(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Reads the files `names` of the directory `path`, as they were together at one moment.

    It changes nothing. The files are opened first, then their names are looked up again: if all
    names still belong to the open files, these were in place together. A save renames new files
    into place and never writes into one, so open files do not change. Other programs may write into
    files; times and sizes show it.

    Returns:
        Name → content of the files that exist.

    Raises:
        AdapterError: the record of a save is damaged; a name is not a plain file; another process
            writes there all the time.
        OSError: a file cannot be read.
    """
    names = list(names)
    for attempt in range(TRIES):
        with contextlib.ExitStack() as opened:
            files = _for_each(path, names, lambda file: opened.enter_context(_open(file)))
            before = {name: _identity(os.fstat(file.fileno())) for name, file in files.items()}
            if before == _for_each(path, names, lambda file: _identity(os.stat(file))):
                contents = {name: file.read() for name, file in files.items()}
                after = {name: _identity(os.fstat(file.fileno())) for name, file in files.items()}
                if before == after:
                    return contents
        time.sleep(attempt / 1000)
    raise AdapterError(
        f"{path} is being written all the time; read it when the other process has finished"
    )


def _for_each(path: Path, names: Iterable[str], look: Callable[[Path], T]) -> dict[str, T]:
    """Returns `look` of each file, or of the one that an unfinished save puts in its place."""
    record, results = _recorded(path), dict[str, T]()
    for name in names:
        source = record.get(name, name)
        # It may have been renamed from `source` to `name` just now.
        for current in () if source is None else dict.fromkeys((source, name)):
            with contextlib.suppress(FileNotFoundError):
                results[name] = look(path / current)
                break
    return results


def _open(file: Path) -> BinaryIO:
    fd = os.open(file, READING)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise AdapterError(f"{file} is not a plain file")
    return os.fdopen(fd, "rb")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Returns what changes if a file is replaced or written into."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _recorded(path: Path) -> dict[str, str | None]:
    """Returns name → the temporary file that an unfinished save puts there; None to remove it."""
    record = path / RECORD
    try:
        with _open(record) as file:
            temporary = dict(json.loads(file.read()))
        is_valid = bool(temporary) and all(
            _is_of_a_save(name, source) for name, source in temporary.items()
        )
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, RecursionError):
        is_valid = False
    if not is_valid:
        raise AdapterError(f"{record} is not a record of a save; remove it")
    return temporary


def _is_of_a_save(name: object, source: object) -> bool:
    if not isinstance(name, str) or name != os.path.basename(name) or name[:1] in ("", "."):
        return False
    return source is None or (isinstance(source, str) and _is_temporary(source, name))


def _is_temporary(source: str, name: str) -> bool:
    return re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.tmp", source) is not None


def _write_through(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rename(path: Path, temporary: Mapping[str, str | None]) -> None:
    for name, source in temporary.items():
        if source is None:
            (path / name).unlink(missing_ok=True)
        elif (path / source).exists():
            os.replace(path / source, path / name)


def _remove_leftovers(path: Path, names: list[str]) -> None:
    """Removes temporary files that killed saves of these files left."""
    for leftover in path.glob(".*.tmp"):
        if any(_is_temporary(leftover.name, name) for name in names):
            leftover.unlink(missing_ok=True)
