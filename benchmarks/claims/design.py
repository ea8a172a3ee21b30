"""How many steps, seeds and rows the study needs: computed from a pilot, before the other arms run.

The pilot is plain LoRA and DoRA, three seeds at their best rates. A paired difference of one seed on
one row is taken as the truth and three independent errors: of the seed, with deviation σ_s; of the
row, which moves all seeds alike, with σ_r; and of the two together, with σ_b. Then n seeds on m rows
give a half width of

    √(t² · (σ_s² + σ_b² / m) / n  +  t'² · σ_r² / m)

and the pilot sees σ_s² + σ_b² / m as the variance between its seeds.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import stats

from benchmarks.claims.analysis import Evidence
from lorakin.compare.estimates import CONFIDENCE, shared_variance
from lorakin.compare.standings import paired_figures

MOST_SEEDS = 30
ROWS = [2**k for k in range(6, 21)]


@dataclasses.dataclass(frozen=True)
class Design:
    """What the pilot says of one task, in points or, for a loss, in nats.

    Attributes:
        of_seeds: the deviation over seeds of DoRA's difference from LoRA, on these rows.
        of_rows: σ_r, the deviation over rows of what moves all seeds alike.
        of_both: σ_b, the deviation of a seed and a row together.
        rows: the rows that are reported on or, where they share prompts, the prompts.
        half: the half width that the study's seeds give with these rows.
        seeds_needed: seeds for the target with these rows; None: no number of seeds reaches it.
        rows_needed: rows for the target with the study's seeds; None: no number of rows does.
        seconds: the processor's seconds of a trial.
    """

    of_seeds: float
    of_rows: float
    of_both: float
    rows: int
    half: float
    seeds_needed: int | None
    rows_needed: int | None
    seconds: float


def design(e: Evidence, seeds: int) -> Design | None:
    """Returns what the pilot says; None if it has not run."""
    plain, other = e.standings["lora"], e.standings["dora"]
    found = paired_figures(other.rows, plain.rows, e.task.measure)
    if found is None or len(found[0]) < 2 or found[1] is None:
        return None
    values, draws, rows = np.array(found[0]) / e.unit, found[1] / e.unit, found[3] or found[2]
    shared = shared_variance(draws)
    of_both = math.sqrt(max(0.0, rows * (float(draws.var(axis=1, ddof=1).mean()) - shared)))
    of_rows, of_seeds = math.sqrt(rows * shared), float(values.std(ddof=1))
    of_seeds_alone = max(0.0, of_seeds**2 - of_both**2 / rows)
    target = e.task.target / e.unit

    def half(n: int, m: int) -> float:
        t, t_rows = (float(stats.t.isf((1 - CONFIDENCE) / 2, df)) for df in (n - 1, m - 1))
        of_runs = math.sqrt((of_seeds_alone + of_both**2 / m) / n)
        return math.hypot(t * of_runs, t_rows * of_rows / math.sqrt(m))

    by_seeds = (n for n in range(2, MOST_SEEDS + 1) if half(n, rows) <= target)
    return Design(
        of_seeds=of_seeds,
        of_rows=of_rows,
        of_both=of_both,
        rows=rows,
        half=half(seeds, rows),
        seeds_needed=next(by_seeds, None),
        rows_needed=next((m for m in ROWS if half(seeds, m) <= target), None),
        seconds=float(np.mean([row.step_work * row.steps for row in plain.done])),
    )
