"""Means over seeds with their intervals and tests, and ratios of times and memory.

Other seeds would have given other figures, and so would other rows to report on. An interval covers
both: with h the half width that each of the two would have alone, by Student's t,

    half width = √(h_seeds² + h_rows²)          (Zou and Donner, Statist. Med. 27, 2008)

So it is never narrower than the interval over the seeds. Adding variances instead, with the
degrees of freedom of Welch and Satterthwaite, covers less than it says where seeds are few.

Rows that share a prompt are drawn together, since answers to one prompt are alike; then prompts
count in place of rows.

Of the rows only that part is added which moves all runs alike. What each run makes of the rows for
itself is in the scatter between the seeds already.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from lorakin.compare.report_answers import Array

CONFIDENCE = 0.95
LEAST_P = 1e-12


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval and a test against zero.

    Attributes:
        mean: the mean over the seeds.
        half_width: half the width of the interval; infinite for one seed.
        count: the number of seeds.
        p: two-sided p-value of the mean against 0, for which the interval ends at 0; 1 for one
            seed. Without draws of the rows it is that of Student's t-test.
        rows: the number of rows whose draw the interval covers; 0 if it covers the seeds alone.
        prompts: how many prompts these rows share; 0 where each row stands alone.
        half_of_rows: half the width of the interval over draws of the rows, for these seeds alone;
            infinite if it is not known.
    """

    mean: float
    half_width: float
    count: int
    p: float
    rows: int = 0
    half_of_rows: float = math.inf
    prompts: int = 0

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        draws: Array | None = None,
        rows: int = 0,
        prompts: int = 0,
    ) -> Estimate:
        """Returns the estimate from the values, one for each seed; there is at least one.

        >>> estimate = Estimate.of([1.0, 2.0, 3.0])
        >>> f"{estimate.mean:.1f} ± {estimate.half_width:.3f}, p = {estimate.p:.3f}"
        '2.0 ± 2.484, p = 0.074'

        Args:
            values: one for each seed.
            draws: each seed's under each draw of the report rows, (seeds, draws), if it is known.
            rows: the number of those rows.
            prompts: how many prompts they share, if they were drawn by prompt.
        """
        mean, count = statistics.fmean(values), len(values)
        known = draws if rows > 1 else None
        drawn = prompts or rows
        half_of_rows = math.inf
        if known is not None:
            error = float(known.mean(axis=0).std(ddof=1))
            half_of_rows = _half_width([(error, drawn - 1)], 1 - CONFIDENCE)
        if count < 2:
            return cls(mean, math.inf, count, 1.0, half_of_rows=half_of_rows)
        errors = [(statistics.stdev(values) / math.sqrt(count), count - 1)]
        if known is not None:
            errors.append((math.sqrt(shared_variance(known)), drawn - 1))
        half = _half_width(errors, 1 - CONFIDENCE)
        p = _p_value(mean, errors)
        covered = (0, 0) if known is None else (rows, prompts)
        return cls(mean, half, count, p, covered[0], half_of_rows, covered[1])

    @property
    def drawn(self) -> str:
        """The rows whose draw the interval covers, in words; "" if it covers the seeds alone.

        >>> dataclasses.replace(Estimate.of([1.0, 2.0]), rows=300, prompts=40).drawn
        '300 rows (of 40 prompts)'
        """
        prompts = f" (of {self.prompts} prompts)" if self.prompts else ""
        return f"{self.rows} rows{prompts}" if self.rows else ""

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return abs(self.mean) > self.half_width

    def as_dict(self) -> dict[str, float | int | None]:
        """Returns the estimate for `--json`."""
        half_width = self.half_width if math.isfinite(self.half_width) else None
        figures = {"mean": self.mean, "half_width": half_width, "seeds": self.count}
        counts = {"rows": self.rows, "prompts": self.prompts}
        return figures | {name: count for name, count in counts.items() if count}


def shared_variance(draws: Array) -> float:
    """Returns the variance over draws that runs have in common: the mean covariance of two of them.

    >>> import numpy as np
    >>> alike = np.array([1.0, 2.0, 3.0])
    >>> shared_variance(np.stack([alike, alike])), shared_variance(np.stack([alike, -alike]))
    (1.0, 0.0)

    Args:
        draws: each run's figure under each draw of the rows, (runs, draws), of two runs or more.
    """
    count, table = len(draws), np.cov(draws)
    return max(0.0, float((table.sum() - np.trace(table)) / (count * (count - 1))))


Errors = Sequence[tuple[float, int]]
"""Standard errors of independent causes, with their degrees of freedom."""


def _half_width(errors: Errors, alpha: float) -> float:
    """Returns half the width of the interval that misses with probability `alpha`."""
    return math.hypot(*(error * float(stats.t.isf(alpha / 2, df)) for error, df in errors))


def _p_value(mean: float, errors: Errors) -> float:
    """Returns the probability `alpha` for which the interval around the mean ends at 0."""
    if not any(error for error, _ in errors):
        return 0.0 if mean else 1.0

    def gap(alpha: float) -> float:
        return _half_width(errors, alpha) - abs(mean)

    return float(optimize.brentq(gap, LEAST_P, 1.0)) if gap(LEAST_P) > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A time or memory as a multiple of plain LoRA's.

    Attributes:
        median: the median of the arm's runs over the median of plain LoRA's.
        low, high: the lowest and the highest of the arm's runs over the same median.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], reference: Sequence[float]) -> Ratio | None:
        """Returns the ratio; None if one of the two has no positive value.

        >>> Ratio.of([2.0, 4.0, 3.0], [1.0, 2.0, 30.0])
        Ratio(median=1.5, low=1.0, high=2.0)
        """
        positive = [x for x in values if x > 0]
        reference = [x for x in reference if x > 0]
        if not positive or not reference:
            return None
        unit = statistics.median(reference)
        return cls(statistics.median(positive) / unit, min(positive) / unit, max(positive) / unit)


def holm(values: dict[str, float]) -> dict[str, float]:
    """Corrects p-values for their number by Holm's procedure (Scand. J. Statist. 6, 1979).

    scipy has no such function.

    >>> holm({"a": 0.01, "b": 0.04})
    {'a': 0.02, 'b': 0.04}
    """
    corrected, least = {}, 0.0
    for position, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (len(values) - position) * p))
        corrected[name] = least
    return corrected
