"""Turns a name from a user into a path, if there can be a file of that name at all."""

from __future__ import annotations

import os
from pathlib import Path

from lorakin.errors import LorakinError, SettingError
from lorakin.storage.schema import short_repr

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""The most bytes of a file's name, and of a path, that file systems take."""


def user_path(
    name: str | os.PathLike[str], what: str, error: type[LorakinError] = SettingError
) -> Path:
    """Returns the path `name`, with its `~` expanded.

    Args:
        name: what the user gave.
        what: the option or setting that it was given for, for messages, such as "--out".
        error: the class of the error.

    Raises:
        LorakinError: no file system has such a name; asking for it would raise OSError or
            ValueError.
    """
    text = os.fspath(name)
    try:
        path = Path(text).expanduser()
        raw = os.fsencode(path)
        short = len(raw) <= LONGEST_PATH and all(
            len(os.fsencode(part)) <= LONGEST_NAME for part in path.parts
        )
        reason = "it holds a NUL character" if b"\0" in raw else "" if short else "it is too long"
    except UnicodeEncodeError:
        reason = "it holds characters that no name can have"
    except RuntimeError:
        reason = "there is no such user's home"
    if reason:
        raise error(f"{what} {short_repr(text)} cannot be a path: {reason}")
    return path
