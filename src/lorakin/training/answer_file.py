"""A file of answers, one JSON object a line, that an interrupted run can go on with.

Answers come in batches, in another order than the rows. Each batch is appended to `OUT.partial` in
one write. When all are there, `OUT` is written whole, in the order of the rows, and `OUT.partial`
is removed. So `OUT` is either complete or not there, and a killed run loses one batch at most.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakin.errors import DataError, OutputError
from lorakin.storage import files, locks

MOST_BYTES = 1 << 30
"""The longest file of answers that is read again."""
GENERATED = "generated"
"""The key of what the model said, beside the row's own columns."""


class AnswerFile:
    """The answers to rows, kept while they come.

    Attributes:
        path: the file that is there in the end.
        partial: the file that holds the answers until then.
        done: a row's number and a speaker's name → the answer, also those of an interrupted run.

    Args:
        path: the file.
        run: what the answers depend on; only a run with the same values goes on with them.

    Raises:
        OutputError: the file exists, belongs to another run, or cannot be written.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        if path.exists():
            raise OutputError(f"{path} exists already; give another --out, or remove it")
        # As JSON has it, so that it can be compared with what is read.
        self.run: dict[str, Any] = json.loads(json.dumps(run, default=str))
        self.done: dict[tuple[int, str], str] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = locks.acquire(path.with_name(f".{path.name}.lock"))
        except locks.LockTaken as error:
            raise OutputError(f"{path}: {error} is writing it; give another --out") from None
        except OSError as error:
            raise OutputError(f"cannot write to {path}: {error.strerror or error}") from error
        self._read()

    def _read(self) -> None:
        """Reads what an interrupted run left, and cuts off a line that it did not finish."""
        if not self.partial.exists():
            self._append([{"run": self.run}])
            return
        content = files.read_limited(self.partial, MOST_BYTES, OutputError)
        whole = content[: content.rfind(b"\n") + 1]
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()] or [{}]
            before = first.get("run", {})
            self.done = {(line["row"], line["name"]): line[GENERATED] for line in lines}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{self.partial} holds no answers that can be gone on with ({error}); remove it"
            ) from None
        other = [key for key in self.run if before.get(key) != self.run[key]]
        if lines and other:
            raise OutputError(
                f"{self.partial} holds {len(lines)} answers of another run: its {other[0]} was "
                f"{before.get(other[0])!r}, and is {self.run[other[0]]!r} now; remove it, or give "
                "another --out"
            )
        with self.partial.open("r+b") as file:
            file.truncate(len(whole) if not other else 0)
        if other:
            self._append([{"run": self.run}])

    def add(self, answers: Mapping[tuple[int, str], str]) -> None:
        """Keeps answers, by the numbers of their rows and their speakers' names.

        Raises:
            OutputError: they cannot be written.
        """
        self._append(
            {"row": row, "name": name, GENERATED: said} for (row, name), said in answers.items()
        )
        self.done.update(answers)

    def finish(self, rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> None:
        """Writes the whole file: each row with its answer, or with one for each name.

        Raises:
            OutputError: it cannot be written; `OUT.partial` still holds the answers.
        """
        complete = self.path.with_name(f"{self.path.name}.complete")
        try:
            with complete.open("wb") as file:
                for number, row in enumerate(rows):
                    said = {name: self.done[number, name] for name in names}
                    one = said if len(names) > 1 else said[names[0]]
                    file.write(_line({**row, GENERATED: one}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(complete, self.path)
            self.partial.unlink()
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror or error}; {self.partial} has all "
                "answers, and the same command goes on from it"
            ) from error
        self.close()

    def close(self) -> None:
        """Lets another process write the file."""
        self.lock.release()

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        try:
            with files.open_for_append(self.partial) as file:
                file.write(b"".join(map(_line, lines)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.partial}: {getattr(error, 'strerror', None) or error}; the "
                f"{len(self.done)} answers before are in it, and the same command goes on from them"
            ) from error


def check_columns(rows: Iterable[Mapping[str, Any]]) -> None:
    """Checks that no row has a column where its answer is to stand.

    Raises:
        DataError: one has.
    """
    if any(GENERATED in row for row in rows):
        raise DataError(
            f"the rows have a column {GENERATED!r}, where the answers would stand; rename it"
        )


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, default=str) + "\n").encode(
        "utf-8", "backslashreplace"
    )
