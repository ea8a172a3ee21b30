"""Computes where the arms of a comparison stand: means, intervals, differences from plain LoRA.

All figures are taken on the report rows, which no learning rate was chosen by. Two arms are
compared seed by seed and on the same draws of the rows: runs with the same seed saw the same rows
in the same order, and all answered the same report rows. The p-value of a difference is corrected
by Holm's procedure for the number of methods: of twenty equal methods, one is expected to pass at
5 % by chance.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from lorakin.compare import next_trials
from lorakin.compare.arms import BASE, HEAD, MEMBER, Arm
from lorakin.compare.constant import CONSTANT, constant_row
from lorakin.compare.estimates import CONFIDENCE, Estimate, Ratio, holm
from lorakin.compare.report_answers import Array, sign_of
from lorakin.compare.results import DIVERGED, DONE, FAILED, TIMING, UNTRAINED, ResultRow


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where one arm stands.

    Attributes:
        arm: the arm.
        rows: its runs at its best learning rate.
        failed_trials: its trials that diverged or failed, at any rate.
        refused: why it cannot run; empty if it can.
        lr: its best learning rate.
        at_edge: whether the best rate is the lowest or highest that was tried.
        quality: the measure on the report rows.
        ahead: how much better it is than plain LoRA; positive is better, for a loss too.
        over_constant, over_head: how much better it is than the best constant answer, and than
            the head alone; None where there is no such thing.
        p: the corrected p-value of `ahead`.
        share: the part of plain LoRA's improvement that it reaches, over the base or over a
            constant answer, whichever is better; None if that improvement is within the noise.
        time: the time of a step, as a multiple of plain LoRA's.
        memory: the memory that training added, as a multiple of plain LoRA's.
    """

    arm: Arm
    rows: list[ResultRow]
    failed_trials: list[ResultRow]
    refused: str
    lr: float | None
    at_edge: bool
    quality: Estimate | None = None
    ahead: Estimate | None = None
    over_constant: Estimate | None = None
    over_head: Estimate | None = None
    p: float = 1.0
    share: float | None = None
    time: Ratio | None = None
    memory: Ratio | None = None

    @property
    def done(self) -> list[ResultRow]:
        """The runs that have figures."""
        return [row for row in self.rows if row.status == DONE]

    @property
    def trained(self) -> int | None:
        """The number of trained parameters, the median of the runs; None if none has figures."""
        return statistics.median_low(row.trained for row in self.done) if self.done else None

    @property
    def kind(self) -> str:
        """The arm's kind."""
        return self.arm.kind

    def as_dict(self) -> dict[str, Any]:
        """Returns the standing for `--json`."""
        return {
            "arm": self.arm.name,
            "title": self.arm.title,
            "kind": self.arm.kind,
            "method": self.arm.words,
            "refused": self.refused or None,
            "learning_rate": self.lr,
            "at_the_edge_of_the_sweep": self.at_edge,
            "quality": self.quality and self.quality.as_dict(),
            "ahead_of_plain": self.ahead and self.ahead.as_dict(),
            "ahead_of_constant": self.over_constant and self.over_constant.as_dict(),
            "ahead_of_head": self.over_head and self.over_head.as_dict(),
            "p": self.p if self.ahead is not None else None,
            "share_of_improvement": self.share,
            "trainable_parameters": self.trained,
            "frozen_parameters": self.done[0].frozen if self.done else None,
            "adapter_bytes": self.done[0].adapter_bytes if self.done else None,
            "time_ratio": self.time and dataclasses.asdict(self.time),
            "memory_ratio": self.memory and dataclasses.asdict(self.memory),
            "seeds": len(self.done),
            "diverged": sum(row.status == DIVERGED for row in self.failed_trials),
            "failed": sum(row.status == FAILED for row in self.failed_trials),
        }


def standings_of(arms: Sequence[Arm], rows: Sequence[ResultRow], measure: str) -> list[Standing]:
    """Returns where each arm stands, in the order of the arms, and the constant answer if any is.

    Args:
        arms: the first is plain LoRA.
        rows: the results.
        measure: "loss", or a metric that the rows have.
    """
    constant = constant_row(rows, measure)
    if constant is not None:
        arms, rows = [*arms, CONSTANT], [*rows, constant]
    plain, base, head, same = (
        next_trials.rows_at_best_rate(name, rows, measure)
        for name in (arms[0].name, BASE, HEAD, CONSTANT.name)
    )
    result = []
    for arm in arms:
        best = next_trials.rows_at_best_rate(arm.name, rows, measure)
        trains = arm.lr is not None
        result.append(
            dataclasses.replace(
                _standing(arm, best, rows, measure),
                ahead=None if arm is arms[0] else paired_difference(best, plain, measure),
                over_constant=paired_difference(best, same, measure) if trains else None,
                over_head=paired_difference(best, head, measure)
                if trains and arm.name != HEAD
                else None,
                time=Ratio.of(_figures(best, "step_work"), _figures(plain, "step_work")),
                memory=Ratio.of(_figures(best, "peak_bytes"), _figures(plain, "peak_bytes")),
            )
        )
    return _corrected(_with_shares(result, plain, [base, same], measure))


def _with_shares(
    standings: Sequence[Standing],
    plain: Sequence[ResultRow],
    zeros: Sequence[Sequence[ResultRow]],
    measure: str,
) -> list[Standing]:
    """Sets the shares of plain LoRA's improvement over the better one of the base and a constant.

    They stay None if that improvement is within the noise.
    """
    sign = sign_of(measure)
    known = [(sign * value, zero) for zero in zeros if (value := _mean(zero, measure)) is not None]
    _, zero = max(known, key=lambda pair: pair[0], default=(0.0, []))
    improvement = paired_difference(plain, zero, measure)
    if improvement is None or improvement.mean <= 0 or not improvement.excludes_zero:
        return list(standings)
    total = improvement.mean
    # From the difference by seed, since an arm may have fewer seeds than plain LoRA.
    return [
        s
        if s.quality is None
        else dataclasses.replace(s, share=1 + (s.ahead.mean if s.ahead else 0.0) / total)
        for s in standings
    ]


def _standing(arm: Arm, best: list[ResultRow], rows: Sequence[ResultRow], measure: str) -> Standing:
    """Returns the standing of an arm, without what compares it with others."""
    scores, by_seed = next_trials.sweep_scores(arm.name, rows, measure), _by_seed(best, measure)
    best_rate, rates = next_trials.best_rate(scores), sorted(scores)
    return Standing(
        arm=arm,
        rows=best,
        failed_trials=[
            row for row in rows if row.trial.arm == arm.name and row.status in (DIVERGED, FAILED)
        ],
        refused=next_trials.refusal(arm, rows),
        lr=best_rate,
        at_edge=best_rate is not None and best_rate in (rates[0], rates[-1]),
        quality=Estimate.of(*_figures_of(list(by_seed.values()), measure)) if by_seed else None,
    )


def _corrected(standings: Sequence[Standing]) -> list[Standing]:
    """Sets the p-values; those of methods are corrected for their number."""
    raw = {s.arm.name: s.ahead.p for s in standings if s.ahead is not None}
    members = {s.arm.name: raw[s.arm.name] for s in standings if s.kind == MEMBER and s.ahead}
    p = raw | holm(members)
    return [dataclasses.replace(s, p=p.get(s.arm.name, 1.0)) for s in standings]


def paired_difference(
    rows: Sequence[ResultRow], others: Sequence[ResultRow], measure: str
) -> Estimate | None:
    """Returns how much better `rows` are than `others`, paired by seed and by draws of the rows.

    What does not train has one row, which counts for every seed. None: no seed has a finished run
    in both.
    """
    found = paired_figures(rows, others, measure)
    return Estimate.of(*found) if found is not None else None


def paired_figures(
    rows: Sequence[ResultRow], others: Sequence[ResultRow], measure: str
) -> tuple[list[float], Array | None, int, int] | None:
    """Returns that difference for each seed, the same under each draw, how many rows and prompts.

    They are the arguments of `Estimate.of`. None: no seed has a finished run in both.
    """
    first, second = _by_seed(rows, measure), _by_seed(others, measure)
    if not first or not second:
        return None
    if _is_untrained(rows):
        first = dict.fromkeys(second, next(iter(first.values())))
    elif _is_untrained(others):
        second = dict.fromkeys(first, next(iter(second.values())))
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    return _figures_of([first[n] for n in seeds], measure, [second[n] for n in seeds])


def _is_untrained(rows: Sequence[ResultRow]) -> bool:
    return all(row.trial.stage == UNTRAINED for row in rows)


def _figures_of(
    rows: Sequence[ResultRow], measure: str, others: Sequence[ResultRow] | None = None
) -> tuple[list[float], Array | None, int, int]:
    """Returns the measure of runs, or how much better they are than others of the same seeds.

    With it come the same under each draw of the report rows, their number, and that of the prompts
    that they share.
    """
    values = np.array([_value(row, measure) for row in rows])
    drawn = _drawn(rows, measure)
    if others is not None:
        sign = sign_of(measure)
        values = sign * (values - [_value(row, measure) for row in others])
        drawn_others = _drawn(others, measure)
        fit = drawn is not None and drawn_others is not None
        fit = fit and _counts(rows) == _counts(others)
        drawn = sign * (drawn - drawn_others) if fit else None  # type: ignore[operator]
    return [float(value) for value in values], drawn, *_counts(rows)


def _counts(rows: Sequence[ResultRow]) -> tuple[int, int]:
    """Returns how many report rows were answered, and how many prompts they share.

    0 if runs differ or kept no answers.
    """
    known = (row.answers for row in rows)
    counts = {(len(one.losses), one.prompts) if one else (0, 0) for one in known}
    return counts.pop() if len(counts) == 1 else (0, 0)


def _drawn(rows: Sequence[ResultRow], measure: str) -> Array | None:
    """Returns the measure of each run under each draw of the report rows, (runs, draws)."""
    found = [row.answers.drawn(measure) if row.answers else None for row in rows]
    known = [draws for draws in found if draws is not None]
    return np.stack(known) if len(known) == len(found) and any(_counts(rows)) else None


def leaders(standings: Sequence[Standing]) -> list[Standing]:
    """Returns the methods that beat plain LoRA by more than the noise, the best first."""
    ahead = [
        (s.ahead.mean, s)
        for s in standings
        if s.kind == MEMBER and s.ahead and s.ahead.mean > 0 and s.p < 1 - CONFIDENCE
    ]
    return [s for _, s in sorted(ahead, key=lambda pair: -pair[0])]


def _value(row: ResultRow, measure: str) -> float:
    return (row.report or {}).get(measure, math.nan)


def _by_seed(rows: Sequence[ResultRow], measure: str) -> dict[int, ResultRow]:
    """Returns seed → its run, for runs that ended well and have the measure."""
    done = (row for row in rows if row.status == DONE)
    return {row.trial.seed: row for row in done if math.isfinite(_value(row, measure))}


def _figures(rows: Sequence[ResultRow], name: str) -> list[float]:
    return [getattr(row, name) for row in rows if row.status == DONE and row.trial.stage != TIMING]


def _mean(rows: Sequence[ResultRow], measure: str) -> float | None:
    by_seed = _by_seed(rows, measure)
    return statistics.fmean(_value(row, measure) for row in by_seed.values()) if by_seed else None
