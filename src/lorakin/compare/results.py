"""The results file of a comparison: one line of JSON for each trial that ended."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from lorakin.compare.report_answers import ReportAnswers
from lorakin.errors import DataError
from lorakin.storage import files
from lorakin.storage.schema import Check, Count, Positive, SchemaError, checked

DONE: Final = "done"
DIVERGED: Final = "diverged"
FAILED: Final = "failed"
REFUSED: Final = "refused"
"""How a trial ends: with figures; with a loss that is not finite; with an error or a kill; or it
could not begin."""
TIMING: Final = "timing"
SWEEP: Final = "sweep"
SEED: Final = "seed"
UNTRAINED: Final = "limit"
"""What a trial is for: it times a step; tries a learning rate; repeats the best rate with another
seed; or evaluates the model without training."""
NAME = re.compile(r"[a-zA-Z0-9][\w+-]*(-lr[0-9.e+-]+)?-seed[0-9]+(-timing)?", re.ASCII)
MOST_BYTES = 1 << 30
"""The largest size of a results file."""

NORMS = {"norm", "relative"}
Figure = Annotated[
    float, Check("a number below 1e100", lambda x: x != x or (abs(x) < 1e100 or x == math.inf))
]
Seconds = Annotated[float, Check("seconds", lambda x: x == 0 or 1e-9 < x < 1e9)]
HeldOutFigures = Annotated[
    dict[str, Figure], Check("figures with a loss", lambda figures: "loss" in figures)
]
ReportFigures = Annotated[
    HeldOutFigures,
    Check("figures with a count", lambda figures: 0 <= figures.get("count", -1) < 1e15),
]
Changes = Annotated[
    dict[str, dict[str, Figure]],
    Check("norms of changes", lambda paths: all(norms.keys() >= NORMS for norms in paths.values())),
]


def _same_modules(history: list[tuple[int, Mapping[str, Any]]]) -> bool:
    return all(ranks.keys() == history[0][1].keys() for _, ranks in history)


Ranks = Annotated[
    list[tuple[Count, dict[str, Count]]],
    Check("ranks of the same modules at each step", _same_modules),
]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: an arm at a learning rate with a seed. `lr` is None if nothing trains.

    >>> Trial("dora,lora+", "sweep", lr=2e-4, seed=1).name
    'dora+lora+-lr0.0002-seed1'
    """

    arm: str
    stage: Literal["timing", "sweep", "seed", "limit"]
    lr: Positive | None
    seed: Count

    @property
    def name(self) -> str:
        """The name of the trial's directory: one word, so that it cannot lead elsewhere.

        Raises:
            ValueError: no comparison has such an arm, rate or seed.
        """
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        timing = "-timing" if self.stage == TIMING else ""
        name = f"{self.arm.replace(',', '+')}{rate}-seed{self.seed}{timing}"
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a trial")
        return name


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """A trial and how it ended.

    Attributes:
        trial: what was run.
        status: `DONE`, `DIVERGED`, `FAILED` or `REFUSED`.
        reason: why it did not end well.
        steps: optimizer steps that were made.
        tune: figures on the rows that learning rates are chosen by; `loss` at least.
        report: figures on the rows to report on; `loss` and `count` at least.
        answers: what was answered to each of those rows; None if they are too many.
        trained: the number of trained parameters.
        frozen: the number of the adapter's parameters that are not trained.
        adapter_bytes: the size of the adapter's files.
        step_seconds: the median seconds of a step by the clock.
        step_work: the median seconds of a step on the processor; on a GPU, by the clock.
        seconds: the seconds of the whole trial.
        peak_bytes: the memory that training added to the process at its peak.
        losses: the training loss of each step.
        curve: (step, loss on the tuning rows) where a recipe evaluates during the run.
        layers: path → `norm`, `relative`, `rank` (see `observe.change_norms`).
        moves: (step, path → (ΔM, ΔD)) at a few steps (see
            `observe.magnitude_direction_changes`).
        ranks: (step, path → rank) at the steps where ranks changed.
        importance: path → share of the importance that a probe found.
        own: paths of the modules with a private pair: LoRA-drop's probe chose them, and the other
            modules share one pair.
        warnings: lorakin's warnings.
        device: the device that the trial ran on.
    """

    trial: Trial
    status: Literal["done", "diverged", "failed", "refused"]
    reason: str = ""
    steps: Count = 0
    tune: HeldOutFigures | None = None
    report: ReportFigures | None = None
    answers: ReportAnswers | None = None
    trained: Count = 0
    frozen: Count = 0
    adapter_bytes: Count = 0
    step_seconds: Seconds = 0.0
    step_work: Seconds = 0.0
    seconds: Seconds = 0.0
    peak_bytes: Count = 0
    losses: list[Figure] = dataclasses.field(default_factory=list)
    curve: list[tuple[Count, Figure]] = dataclasses.field(default_factory=list)
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
        """Returns the row as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=True)

    @classmethod
    def from_json(cls, line: str) -> ResultRow:
        """Reads a row from a line of JSON.

        Raises:
            ValueError: the line is not JSON, or not a row.
            RecursionError: it is nested too deeply.
        """
        row: ResultRow = checked(cls, json.loads(line))
        if (row.trial.lr is None) != (row.trial.stage == UNTRAINED):
            raise SchemaError(f"trial.lr is {row.trial.lr!r} in a trial of stage {row.trial.stage}")
        return row


class Results:
    """The rows of a results file. Only one process may have it open."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Removes a last line that is incomplete because the process was killed.

        Raises:
            DataError: `path` is not a file, or a line is not a row.
        """
        self.path = path
        self.rows: list[ResultRow] = []
        content = files.read_limited(path, MOST_BYTES, DataError) if path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(complete.decode("utf-8", errors="replace").splitlines(), 1):
            try:
                self.rows.append(ResultRow.from_json(line))
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number} is not a row of a comparison: {error}; delete that line"
                ) from None
        if len(complete) < len(content):
            os.truncate(path, len(complete))

    def set_failed_aside(self) -> int:
        """Leaves out the trials whose process died, so that they run again; returns their number.

        The file keeps them. A trial that diverged would do so again, and stays.
        """
        left = [row for row in self.rows if row.status != FAILED]
        count = len(self.rows) - len(left)
        self.rows = left
        return count

    def add(self, row: ResultRow) -> None:
        """Appends a row and flushes it to disk."""
        with files.open_for_append(self.path) as file:
            file.write(row.as_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
