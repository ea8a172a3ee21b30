"""Opens files that strangers made: only plain files, and only up to the length they may have."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from lorakin.errors import AdapterError, LorakinError, OutputError

KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def regular(path: Path, error: type[LorakinError] = AdapterError) -> Path:
    """`path`, if it is a plain file: reading a pipe or a device may never end.

    Raises:
        LorakinError: `error`, for what is neither a file nor a link to one.
        OSError: there is nothing, or it cannot be looked at.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise error(f"{path} is a {KINDS.get(stat.S_IFMT(mode), 'special file')}, expected a file")
    return path


def content(path: Path, most: int, error: type[LorakinError] = AdapterError) -> bytes:
    """The bytes of a file that may have at most `most` of them.

    Raises:
        LorakinError: `error`, for no file, or one that is longer.
        OSError: it cannot be read.
    """
    with open(regular(path, error), "rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise error(f"{path} is longer than {most:,} bytes, the limit for this file")
    return found


def appending(path: Path) -> BinaryIO:
    """The file `path`, made if need be, open for adding to its end. A link there is not followed.

    Raises:
        OutputError: it is a link, or cannot be opened.
    """
    try:
        flags = (
            os.O_WRONLY
            | os.O_APPEND
            | os.O_CREAT
            | getattr(os, "O_NOFOLLOW", 0)
            | getattr(os, "O_BINARY", 0)
        )
        return open(os.open(path, flags, 0o666), "ab")
    except OSError as error:
        reason = (
            "it is a link, which is not written through"
            if path.is_symlink()
            else error.strerror or error
        )
        raise OutputError(f"cannot write to {path}: {reason}") from error
