"""The trials of a comparison and what came of them: one JSON row each, in a file that only ever grows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from lorakin.errors import DataError
from lorakin.storage import files
from lorakin.storage.schema import Check, Count, Misfit, Positive, fitted

DONE: Final = "done"
DIVERGED: Final = "diverged"
FAILED: Final = "failed"
REFUSED: Final = "refused"
"""How a trial ends: with figures; with a loss that is not finite; by an error or a kill; or it could not begin."""
TIMING: Final = "timing"
SWEEP: Final = "sweep"
SEED: Final = "seed"
LIMIT: Final = "limit"
"""What a trial is for: how long a step takes; which learning rate; another seed at that rate; a model as it is."""
NAME = re.compile(r"[a-zA-Z0-9][\w+-]*(-lr[0-9.e+-]+)?-seed[0-9]+(-timing)?", re.ASCII)
MOST_BYTES = 1 << 30
"""Of a results file."""

NORMS = {"norm", "relative"}
Figure = Annotated[
    float, Check("a number below 1e100", lambda x: x != x or (abs(x) < 1e100 or x == math.inf))
]
Seconds = Annotated[float, Check("seconds", lambda x: x == 0 or 1e-9 < x < 1e9)]
Held = Annotated[dict[str, Figure], Check("figures with a loss", lambda found: "loss" in found)]
Reported = Annotated[
    Held, Check("figures with a count", lambda found: 0 <= found.get("count", -1) < 1e15)
]
Changes = Annotated[
    dict[str, dict[str, Figure]],
    Check("norms of changes", lambda found: all(at.keys() >= NORMS for at in found.values())),
]


def _of_the_same(history: list[tuple[int, Mapping[str, Any]]]) -> bool:
    return all(at.keys() == history[0][1].keys() for _, at in history)


Ranks = Annotated[
    list[tuple[Count, dict[str, Count]]],
    Check("ranks of the same modules at each step", _of_the_same),
]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: an arm at a learning rate (None: nothing trains) with a seed."""

    arm: str
    stage: Literal["timing", "sweep", "seed", "limit"]
    lr: Positive | None
    seed: Count

    @property
    def name(self) -> str:
        """For its directory: one word, which leads nowhere else, whatever is in it.

        Raises:
            ValueError: an arm, rate or seed that no comparison has.
        """
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        name = f"{self.arm.replace(',', '+')}{rate}-seed{self.seed}{'-timing' if self.stage == TIMING else ''}"
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a trial")
        return name


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """A trial and how it ended. Times are in seconds; `peak_bytes` is what training added to the process.

    Of a step, the median: `step_seconds` by the clock, `step_work` of the processor where trials share one, else the same.

    `tune` and `report` are the evaluations on the two held-out parts. `layers` has path → {norm, relative, rank}, the norm of
    the change of the module's weight, Frobenius, and its ratio to the weight's. `moves` are rows of step and path → (ΔM, ΔD),
    `ranks` of step and path → rank, where ranks change.
    """

    trial: Trial
    status: Literal["done", "diverged", "failed", "refused"]
    reason: str = ""
    steps: Count = 0
    tune: Held | None = None
    report: Reported | None = None
    trained: Count = 0
    frozen: Count = 0
    adapter_bytes: Count = 0
    step_seconds: Seconds = 0.0
    step_work: Seconds = 0.0
    seconds: Seconds = 0.0
    peak_bytes: Count = 0
    losses: list[Figure] = dataclasses.field(default_factory=list)
    layers: Changes = dataclasses.field(default_factory=dict)
    moves: list[tuple[Count, dict[str, tuple[Figure, Figure]]]] = dataclasses.field(
        default_factory=list
    )
    ranks: Ranks = dataclasses.field(default_factory=list)
    importance: dict[str, Figure] = dataclasses.field(default_factory=dict)
    own: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    device: str = ""

    def as_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), allow_nan=True)

    @classmethod
    def from_json(cls, line: str) -> ResultRow:
        """The row of such a line; raises ValueError or RecursionError if it is none."""
        row: ResultRow = fitted(cls, json.loads(line))
        if (row.trial.lr is None) != (row.trial.stage == LIMIT):
            raise Misfit(f"trial.lr is {row.trial.lr!r} in a trial of stage {row.trial.stage}")
        return row


class Results:
    """The rows in `path`, which `add` appends to. Only one process may have it open."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that a kill cut off is cut away.

        Raises:
            DataError: no file, or a line that is no row.
        """
        self.path = path
        self.rows: list[ResultRow] = []
        content = files.content(path, MOST_BYTES, DataError) if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), 1):
            try:
                self.rows.append(ResultRow.from_json(line))
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number} is no row of a comparison: {error}; remove that line"
                ) from None
        if len(whole) < len(content):
            os.truncate(path, len(whole))

    def add(self, row: ResultRow) -> None:
        """Append a row, and see to it that it is on the disk."""
        with files.appending(self.path) as file:
            file.write(row.as_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
