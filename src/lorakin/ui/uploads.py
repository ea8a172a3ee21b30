"""Files that the user dropped on the page, kept in the folder of the runs."""

from __future__ import annotations

import errno
import filecmp
import itertools
import os
import re
import shutil
import uuid
from pathlib import Path

from lorakin.errors import OutputError

FOLDER = "uploads"
LONGEST = 100
"""The most characters of a file's name."""


def safe_name(name: str) -> str:
    """Returns a file's name that leads nowhere else and needs no quotes.

    >>> safe_name("../my rows.jsonl"), safe_name(".."), safe_name("-x")
    ('my_rows.jsonl', 'data', 'x')
    """
    plain = re.sub(r"[^\w.+-]+", "_", name.replace("\\", "/").rpartition("/")[2])
    return plain.lstrip(".-_")[-LONGEST:] or "data"


def keep(source: Path, runs: Path, name: str | None = None) -> Path:
    """Copies a file into the uploads of a folder of runs, and returns where it is.

    A file of the same content and name is there once; of another content it gets a number.

    Args:
        source: the file.
        runs: the folder of the runs.
        name: the name that the user's file has; None for that of `source`.

    Raises:
        OutputError: it cannot be written.
    """
    name = safe_name(name or source.name)
    stem, dot, ending = name.partition(".")
    partial = runs / FOLDER / f".{uuid.uuid4().hex}"
    try:
        (runs / FOLDER).mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = runs / FOLDER / (name if number == 1 else f"{stem}-{number}{dot}{ending}")
            if not path.exists() and not path.is_symlink():
                shutil.copyfile(source, partial)
                os.replace(partial, path)
                return path
            if path.is_file() and filecmp.cmp(source, path, shallow=False):
                return path
    except OSError as error:
        partial.unlink(missing_ok=True)
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise OutputError(
            f"cannot keep {name} in {runs / FOLDER}: {what}; make room, or start lorakin ui with "
            "another --runs"
        ) from error
    raise AssertionError("itertools.count ends")
