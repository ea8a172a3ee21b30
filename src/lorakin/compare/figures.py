"""Writes a comparison's figures: shares in per cent and points, others as plain numbers."""

from __future__ import annotations

import math

from lorakin.compare.estimates import Estimate
from lorakin.compare.report_answers import CORRELATIONS, LOSS, is_share

POINT, NATS = 0.01, 0.02
"""Differences that do not matter: a point of a share or a correlation, and of a loss in nats."""


def margin_of(measure: str) -> float | None:
    """Returns the size below which a difference is none; None for a measure without such a size.

    >>> margin_of("accuracy"), margin_of("loss"), margin_of("reward_margin")
    (0.01, 0.02, None)
    """
    if measure == LOSS:
        return NATS
    return POINT if is_share(measure) or measure in CORRELATIONS else None


def amount(value: float, measure: str) -> str:
    """Writes a difference of two values of the measure.

    >>> amount(0.105, "accuracy"), amount(1.23456, "loss"), amount(0.12, "matthews")
    ('10.5 points', '1.235', '0.120')
    """
    return f"{100 * value:.1f} points" if is_share(measure) else f"{value:.3f}".replace("-", "−")


def level(value: float, measure: str) -> str:
    """Writes a value of the measure.

    >>> level(0.684, "accuracy"), level(0.684, "pearson")
    ('68.4 %', '0.684')
    """
    return f"{100 * value:.1f} %" if is_share(measure) else amount(value, measure)


def percent(share: float, digits: int = 0) -> str:
    """Writes a share as a percentage.

    >>> percent(0.974)
    '97 %'
    """
    return f"{100 * share + 0.0:.{digits}f} %".replace("-0 %", "0 %")


def interval(estimate: Estimate, measure: str) -> str:
    """Writes the ends of the 95 % interval."""
    low, high = estimate.mean - estimate.half_width, estimate.mean + estimate.half_width
    return f"95 % interval {amount(low, measure)} to {amount(high, measure)}"


def plus_minus(difference: Estimate, measure: str) -> str:
    """Writes the size of a difference, and half its interval if it has one.

    >>> plus_minus(Estimate(mean=-0.02, half_width=0.005, count=3, p=0.01), "accuracy")
    '2.0 ± 0.5 points'
    """
    size = amount(abs(difference.mean), measure)
    if not math.isfinite(difference.half_width):
        return size
    return f"{size.removesuffix(' points')} ± {amount(difference.half_width, measure)}"


def with_interval(estimate: Estimate, measure: str, signed: bool = False) -> str:
    """Writes a value with half its interval, if it has one; `signed` is for differences.

    >>> with_interval(Estimate(mean=-0.02, half_width=0.005, count=3, p=0.01), "loss", signed=True)
    '−0.020 ± 0.005'
    >>> with_interval(Estimate(mean=0.622, half_width=0.099, count=3, p=0.01), "accuracy")
    '62.2 ± 9.9 %'
    """
    if signed:
        return f"{'−' if estimate.mean < 0 else '+'}{plus_minus(estimate, measure)}"
    mean = level(estimate.mean, measure)
    if not math.isfinite(estimate.half_width):
        return mean
    unit = " %" if is_share(measure) else ""
    return f"{mean.removesuffix(unit)} ± {level(estimate.half_width, measure)}"
