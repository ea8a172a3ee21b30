"""How many steps, seeds and rows the study needs: computed from a pilot, before the other arms run.

The pilot is plain LoRA and DoRA, three seeds at their best rates.
With s the spread between seeds of the paired difference, and σ that between rows, n seeds and m rows
give a half width of

    √((t · s / √n)² + (t' · σ / √m)²)
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import stats

from benchmarks.claims.analysis import Evidence
from lorakin.compare.standings import Standing, paired_difference

MOST_SEEDS = 30
CONFIDENCE = 0.975


@dataclasses.dataclass(frozen=True)
class Design:
    """What the pilot says of one task, in points or, for a loss, in nats.

    Attributes:
        of_seeds: s, the standard deviation over seeds of DoRA's difference from LoRA.
        of_rows: σ, the standard deviation over rows of that difference.
        rows: the rows that are reported on.
        half: the half width that the study's seeds give with these rows.
        seeds_needed: seeds for the target with these rows; None: no number of seeds reaches it.
        rows_needed: rows for the target with the study's seeds; None: no number of rows does.
        seconds: the processor's seconds of a trial.
    """

    of_seeds: float
    of_rows: float
    rows: int
    half: float
    seeds_needed: int | None
    rows_needed: int | None
    seconds: float


def design(e: Evidence, seeds: int) -> Design | None:
    """Returns what the pilot says; None if it has not run."""
    plain, other = e.standings["lora"], e.standings["dora"]
    found = paired_difference(other.rows, plain.rows, e.task.measure)
    if found is None or found.count < 2:
        return None
    first, second = _by_seed(e, other), _by_seed(e, plain)
    values = np.array([first[seed] - second[seed] for seed in first.keys() & second.keys()])
    of_seeds = float(values.std(ddof=1))
    rows = found.rows
    of_rows = found.half_of_rows / e.unit / stats.t.ppf(CONFIDENCE, rows - 1) * math.sqrt(rows)
    target = e.task.target / e.unit

    def half(n: int, m: int) -> float:
        return math.hypot(
            float(stats.t.ppf(CONFIDENCE, n - 1)) * of_seeds / math.sqrt(n),
            float(stats.t.ppf(CONFIDENCE, m - 1)) * of_rows / math.sqrt(m),
        )

    by_seeds = (n for n in range(2, MOST_SEEDS + 1) if half(n, rows) <= target)
    by_rows = (m for m in (2**k for k in range(6, 21)) if half(seeds, m) <= target)
    return Design(
        of_seeds=of_seeds,
        of_rows=of_rows,
        rows=rows,
        half=half(seeds, rows),
        seeds_needed=next(by_seeds, None),
        rows_needed=next(by_rows, None),
        seconds=float(np.mean([row.step_work * row.steps for row in plain.done])),
    )


def _by_seed(e: Evidence, standing: Standing) -> dict[int, float]:
    return {row.trial.seed: (row.report or {})[e.task.measure] / e.unit for row in standing.done}
