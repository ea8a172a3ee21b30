"""The trials of a comparison and what came of them: one JSON row each, in a file that only ever grows."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from lorakin.errors import DataError

DONE, DIVERGED, FAILED, REFUSED = "done", "diverged", "failed", "refused"
"""How a trial ends: with figures; with a loss that is not finite; by an error or a kill; or it could not begin."""
TIMING, SWEEP, SEED, LIMIT = "timing", "sweep", "seed", "limit"
"""What a trial is for: how long a step takes; which learning rate; another seed at that rate; a model as it is."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: an arm at a learning rate (None: nothing trains) with a seed."""

    arm: str
    stage: str
    lr: float | None
    seed: int

    @property
    def name(self) -> str:
        """For its directory."""
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        return f"{self.arm.replace(',', '+')}{rate}-seed{self.seed}{'-timing' if self.stage == TIMING else ''}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A trial and how it ended. Times are in seconds; `peak_bytes` is what training added to the process.

    Of a step, the median: `step_seconds` by the clock, `step_work` of the processor where trials share one, else the same.

    `tune` and `report` are the evaluations on the two held-out parts. `layers` has path → {norm, relative, rank}, the norm of
    the change of the module's weight, Frobenius, and its ratio to the weight's. `moves` are rows of step and path → (ΔM, ΔD),
    `ranks` of step and path → rank, where ranks change.
    """

    trial: Trial
    status: str
    reason: str = ""
    steps: int = 0
    tune: dict[str, float] | None = None
    report: dict[str, float] | None = None
    trained: int = 0
    frozen: int = 0
    adapter_bytes: int = 0
    step_seconds: float = 0.0
    step_work: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    layers: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    moves: list[tuple[int, dict[str, tuple[float, float]]]] = dataclasses.field(default_factory=list)
    ranks: list[tuple[int, dict[str, int]]] = dataclasses.field(default_factory=list)
    importance: dict[str, float] = dataclasses.field(default_factory=dict)
    own: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    device: str = ""

    def as_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), allow_nan=True)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """The row of such a line; raises ValueError or TypeError if it is none."""
        content: dict[str, Any] = json.loads(line)
        return cls(**(content | {"trial": Trial(**content["trial"])}))


class Results:
    """The rows in `path`, which `add` appends to. Only one process may have it open."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that a kill cut off is cut away.

        Raises:
            DataError: a line that is no row.
        """
        self.path = path
        self.rows: list[Row] = []
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), 1):
            try:
                self.rows.append(Row.from_json(line))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path}, line {number} is no row of a comparison: {error}; remove that line") from None
        if len(whole) < len(content):
            os.truncate(path, len(whole))

    def add(self, row: Row) -> None:
        """Append a row, and see to it that it is on the disk."""
        with self.path.open("ab") as file:
            file.write(row.as_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
