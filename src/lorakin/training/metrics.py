"""Metrics of answers against what is right, by scikit-learn and scipy, with bootstrap intervals.

Each metric takes the right answers and the given ones, (rows,) or (rows, classes), and weights of
the rows. Weights make the bootstrap cheap: a row that is drawn three times has the weight 3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lorakin.errors import SettingError

Array = npt.NDArray[Any]
DRAWS = 1000
"""How often the rows are drawn again for an interval."""
LEAST_PROMPTS = 20
"""Fewer groups than these do not show how much they scatter."""


@dataclasses.dataclass(frozen=True)
class MetricValue:
    """A metric's value, and the 95 % interval over draws of the rows, if it was taken."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{interval}"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A function of (right answers, given answers, weights of the rows), and what is better.

    A metric that `is_share` lies between 0 and 1, and is written in per cent and points.
    """

    name: str
    of: Callable[[Array, Array, Array], float]
    higher_is_better: bool = True
    is_share: bool = False


def _sklearn(name: str, **options: Any) -> Callable[[Array, Array, Array], float]:
    def of(right: Array, given: Array, weights: Array) -> float:
        import sklearn.metrics  # which takes half a second

        function = getattr(sklearn.metrics, name)
        return float(function(right, given, sample_weight=weights, **options))

    return of


def _accuracy(right: Array, given: Array, weights: Array) -> float:
    """Returns the share of rows that are right, in all classes where a row has several.

    In NumPy: sklearn's takes some 50 times as long, and a bootstrap asks 200 times for each run.
    """
    same = right == given
    return float(np.average(same.all(axis=1) if same.ndim > 1 else same, weights=weights))


def _f1(right: Array, given: Array, weights: Array) -> float:
    """Returns F1 of the second class if there are two, else the mean over classes."""
    classes = int(max(right.max(), given.max())) + 1
    options = {"average": "binary"} if classes <= 2 else {"average": "macro"}
    return _sklearn("f1_score", zero_division=0.0, **options)(right, given, weights)


def _pearson(right: Array, given: Array, weights: Array) -> float:
    covariance = np.cov(right, given, aweights=weights)
    spread = np.sqrt(covariance[0, 0] * covariance[1, 1])
    return float(covariance[0, 1] / spread) if spread > 0 else 0.0


def _spearman(right: Array, given: Array, weights: Array) -> float:
    import scipy.stats

    # Ranks of the rows as they were drawn: a row of weight 3 stands there three times.
    times = weights.astype(int)
    ranks = [scipy.stats.rankdata(np.repeat(values, times)) for values in (right, given)]
    return _pearson(ranks[0], ranks[1], np.ones(len(ranks[0])))


def _reward_accuracy(rejected: Array, chosen: Array, weights: Array) -> float:
    """Returns the share of rows in which the better answer has the higher reward; ties are half."""
    won = (chosen > rejected) + 0.5 * (chosen == rejected)
    return float(np.average(won, weights=weights))


def _reward_margin(rejected: Array, chosen: Array, weights: Array) -> float:
    return float(np.average(chosen - rejected, weights=weights))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _accuracy, is_share=True),
        Metric("f1", _f1, is_share=True),
        Metric("matthews", _sklearn("matthews_corrcoef")),
        Metric("pearson", _pearson),
        Metric("spearman", _spearman),
        Metric("mean_absolute_error", _sklearn("mean_absolute_error"), higher_is_better=False),
        Metric("micro_f1", _sklearn("f1_score", average="micro", zero_division=0.0), is_share=True),
        Metric("macro_f1", _sklearn("f1_score", average="macro", zero_division=0.0), is_share=True),
        Metric("exact_match", _accuracy, is_share=True),
        Metric("reward_accuracy", _reward_accuracy, is_share=True),
        Metric("reward_margin", _reward_margin),
    )
}


def check_metric(name: str | None, known: Sequence[str], task: str) -> None:
    """Checks that a metric fits a task; None fits every one.

    >>> check_metric("matthews", ["accuracy", "matthews"], "classification")

    Raises:
        SettingError: it does not.
    """
    allowed = ["loss", *known]
    if name is not None and name not in allowed:
        raise SettingError(
            f"metric is {name!r}, which does not fit the task {task}; expected one of "
            f"{', '.join(allowed)}"
        )


def figures(
    names: Sequence[str], right: Array, given: Array, intervals: bool = False
) -> dict[str, MetricValue]:
    """Returns the metrics `names` of given answers against the right ones.

    >>> right, given = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    >>> figures(["accuracy"], right, given)["accuracy"].value
    0.75

    Args:
        names: keys of `METRICS`.
        right: (rows,) or (rows, classes).
        given: the same shape.
        intervals: whether to draw the rows again for an interval.
    """
    rows = len(right)
    ones = np.ones(rows)
    found = {name: METRICS[name].of(right, given, ones) for name in names}
    if not intervals or rows < 2:
        return {name: MetricValue(value) for name, value in found.items()}
    draws = draws_of(rows)
    return {
        name: MetricValue(value, *interval([METRICS[name].of(right, given, w) for w in draws]))
        for name, value in found.items()
    }


def mean_interval(totals: Array, counts: Array, groups: Sequence[int] = ()) -> tuple[float, float]:
    """Returns the 95 % interval of Σ totals / Σ counts over draws of the rows.

    >>> mean_interval(np.ones(10), np.ones(10))
    (1.0, 1.0)

    Args:
        totals: a sum of each row, such as its loss: (rows,).
        counts: of how many things, such as tokens: (rows,).
        groups: as for `draws_of`.
    """
    draws = draws_of(len(totals), groups=tuple(groups))
    return interval((draws @ totals) / np.maximum(draws @ counts, 1))


def prompt_groups(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Returns the number of each row's prompt, for rows that share prompts; else an empty list.

    Answers to one prompt are alike, so an interval over draws of single rows would be too narrow.
    Fewer prompts than `LEAST_PROMPTS` are taken as given: of so few, no interval can be had.

    >>> prompt_groups([[1], [2], [1]] + [[n] for n in range(3, 30)])[:5]
    [0, 1, 0, 2, 3]
    >>> prompt_groups([[1], [2], [3]]), prompt_groups([[1], [1], [1]])
    ([], [])

    Args:
        prompts: each row's tokens before its answer. A row without any stands alone.
    """
    numbers: dict[Any, int] = {}
    groups = [
        numbers.setdefault(tuple(prompt) or at, len(numbers)) for at, prompt in enumerate(prompts)
    ]
    return groups if LEAST_PROMPTS <= len(numbers) < len(prompts) else []


@functools.lru_cache(maxsize=4)
def draws_of(rows: int, draws: int = DRAWS, groups: tuple[int, ...] = ()) -> Array:
    """Returns how often each row is in each draw of as many rows, always the same: (draws, rows).

    >>> draws_of(3).sum(1)[:4].tolist()
    [3, 3, 3, 3]

    Args:
        rows: the number of rows.
        draws: the number of draws.
        groups: the number of each row's group, from 0, where those of a group are drawn together;
            as many groups are drawn as there are. Without them each row is drawn for itself.
    """
    count = max(groups) + 1 if groups else rows
    drawn: Array = np.random.default_rng(0).multinomial(count, np.ones(count) / count, size=draws)
    if groups:
        drawn = drawn[:, np.array(groups)]
    drawn.setflags(write=False)  # it is kept for the next call
    return drawn


def interval(values: Sequence[float] | Array) -> tuple[float, float]:
    """Returns the middle 95 % of values.

    >>> interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    low, high = np.quantile(np.asarray(values), [0.025, 0.975])
    return float(low), float(high)


def as_plain(found: Mapping[str, MetricValue]) -> dict[str, float]:
    """Returns the values, and the intervals as `name_low` and `name_high`.

    >>> as_plain({"f1": MetricValue(0.5)})
    {'f1': 0.5}
    """
    plain: dict[str, float] = {}
    for name, figure in found.items():
        plain[name] = figure.value
        if figure.low is not None and figure.high is not None:
            plain |= {f"{name}_low": figure.low, f"{name}_high": figure.high}
    return plain
