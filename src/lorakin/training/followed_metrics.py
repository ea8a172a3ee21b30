"""Reads `metrics.jsonl` again and again while a run writes it: only what is new is read."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from lorakin.errors import DataError
from lorakin.storage import files
from lorakin.training.metrics_file import MOST_BYTES, row_of

SEAM = 512
"""Bytes before the place where reading goes on; if they changed, it begins again."""


class FollowedMetrics:
    """A file of metrics that is read on from where the last look ended.

    A run that is resumed writes the file again with fewer rows, which is noticed.
    """

    def __init__(self, path: Path) -> None:
        """Takes the path of the file, which need not exist yet."""
        self.path = path
        self._lock = threading.Lock()
        self._begin_again()

    def _begin_again(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._lines, self._end, self._seam = 0, 0, b""

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of all whole lines so far; none if there is no file.

        Raises:
            DataError: the file holds something else, or is too large.
        """
        with self._lock:
            try:
                new = self._new_lines()
            except FileNotFoundError:
                self._begin_again()
                return []
            except OSError as error:
                raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from None
            found = [
                row_of(line.decode("utf-8", errors="replace"), self.path, number)
                for number, line in enumerate(new.split(b"\n"), self._lines + 1)
                if line
            ]
            self._rows += found
            self._lines += new.count(b"\n")
            self._end += len(new)
            self._seam = (self._seam + new)[-SEAM:]
            return [*self._rows]

    def _new_lines(self) -> bytes:
        """Returns the whole lines that were not read yet; all of them if earlier ones changed."""
        with open(files.checked_file(self.path, DataError), "rb") as file:
            size = file.seek(0, 2)
            if size > MOST_BYTES:
                raise DataError(f"{self.path} has {size:,} bytes; at most {MOST_BYTES:,} are read")
            file.seek(self._end - len(self._seam))
            if file.read(len(self._seam)) != self._seam:
                self._begin_again()
                file.seek(0)
            new = file.read(size)
        return new[: new.rfind(b"\n") + 1]
