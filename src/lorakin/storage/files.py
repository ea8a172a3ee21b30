"""Opens files from outside: only plain files, and only up to the length that they may have."""

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


def checked_file(path: Path, error: type[LorakinError] = AdapterError) -> Path:
    """Returns `path` if it is a plain file: reading a pipe or a device may never end.

    Raises:
        LorakinError: of the class `error`, for what is neither a file nor a link to one.
        OSError: it does not exist or cannot be looked at.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise error(f"{path} is a {KINDS.get(stat.S_IFMT(mode), 'special file')}, expected a file")
    return path


def read_limited(path: Path, most: int, error: type[LorakinError] = AdapterError) -> bytes:
    """Returns the content of a file of at most `most` bytes.

    Raises:
        LorakinError: of the class `error`, if it is not a plain file, or longer.
        OSError: it cannot be read.
    """
    with open(checked_file(path, error), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise error(f"{path} is longer than {most:,} bytes, the limit for this file")
    return content


def open_for_append(path: Path) -> BinaryIO:
    """Opens the file `path`, made if need be, for adding to its end; does not follow a link.

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
        is_link = path.is_symlink()
        reason = "it is a link" if is_link else error.strerror or error
        raise OutputError(f"cannot write to {path}: {reason}") from error
