"""The tables of a comparison's report: all arms, and what did not end well."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorakin.compare.arms import CONTROL, LIMIT, MEMBER, PLAIN, REFERENCE
from lorakin.compare.estimates import Estimate, Ratio
from lorakin.compare.figures import percent, with_interval
from lorakin.compare.learned import nothing_learned
from lorakin.compare.report_answers import sign_of, words_of
from lorakin.compare.standings import Standing
from lorakin.report.page import Cell, Column, Table, TableRow, Value


def arms_table(standings: Sequence[Standing], measure: str) -> Table:
    """Returns the table of all arms, the best first.

    Args:
        standings: where the arms stand.
        measure: "loss", or the metric that decides.
    """
    order = sorted(standings, key=lambda s: _badness(s, measure))
    methods = (s for s in order if s.kind in (REFERENCE, MEMBER) and s.quality is not None)
    best = None if nothing_learned(standings) else next(methods, None)
    rows = [TableRow(_cells(s, measure), _mark(s, best)) for s in order]
    note = ""
    if best is not None:
        note = (
            "**best** is the best mean. It need not be better than the next by more than the "
            "noise: see the verdict."
        )
    return Table("Every arm at its own best learning rate", _columns(measure), rows, note)


def _columns(measure: str) -> list[Column]:
    better = "more" if sign_of(measure) > 0 else "less"
    return [
        Column(
            "arm",
            "A **control** shows where a difference comes from; a **limit**, what can be gained.",
            numeric=False,
        ),
        Column(
            words_of(measure),
            "Mean over the seeds with its 95 % interval, on the held-out rows to report on; "
            f"{better} is better.",
        ),
        Column(
            "ahead",
            f"How much better than tuned {PLAIN}, seed by seed, with its 95 % interval.",
        ),
        Column(
            "share",
            f"The part of {PLAIN}'s improvement that the arm reaches, over the base or over a "
            "constant answer, whichever is better.",
        ),
        Column("best lr", "The best learning rate on the tuning rows."),
        Column("trained", "The number of trained parameters."),
        Column("frozen", "How many parameters the adapter stores but never trains."),
        Column("MiB", "The size of the adapter's files."),
        Column(
            "time",
            f"The time of a training step, × {PLAIN}'s: median over the seeds (lowest–highest).",
        ),
        Column(
            "memory",
            f"The memory that training added to the process at its peak, × {PLAIN}'s: median over "
            "the seeds (lowest–highest).",
        ),
    ]


def _badness(s: Standing, measure: str) -> float:
    """Sorts the best arm first, and arms without a figure last."""
    if s.quality is None:
        return math.inf
    return -sign_of(measure) * s.quality.mean


def _mark(s: Standing, best: Standing | None) -> str:
    """Returns the word beside the arm's name."""
    if s.refused:
        return "left out"
    if not s.done:
        return "failed" if s.failed_trials else "not yet run"
    if len(s.done) < len(s.rows):
        return f"{len(s.done)} of {len(s.rows)} seeds"
    if s is best:
        return "best"
    return s.kind if s.kind in (CONTROL, LIMIT) else ""


def _cells(s: Standing, measure: str) -> list[Value]:
    row = s.done[0] if s.done and s.lr is not None else None
    return [
        s.arm.title,
        _estimate(s.quality, measure),
        _estimate(s.ahead, measure, signed=True),
        None if s.share is None else Cell(percent(s.share), s.share),
        None if s.lr is None else Cell(f"{s.lr:g}{' (edge)' if s.at_edge else ''}", s.lr),
        None if row is None else row.trained,
        row.frozen if row and row.frozen else None,
        None if row is None else Cell(f"{row.adapter_bytes / 2**20:.2f}", row.adapter_bytes),
        _ratio(s.time),
        _ratio(s.memory),
    ]


def _estimate(estimate: Estimate | None, measure: str, signed: bool = False) -> Value:
    if estimate is None:
        return None
    return Cell(with_interval(estimate, measure, signed), estimate.mean)


def _ratio(ratio: Ratio | None) -> Value:
    if ratio is None:
        return None
    return Cell(f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})", ratio.median)


def troubles_table(standings: Sequence[Standing]) -> Table | None:
    """Returns the arms that were left out and the trials that did not end well; None if none."""
    rows: list[list[Value]] = [
        [s.arm.title, None, None, "left out", s.refused] for s in standings if s.refused
    ]
    for s in standings:
        rows += [
            [s.arm.title, row.trial.lr, row.trial.seed, row.status, row.reason]
            for row in s.failed_trials
        ]
    columns = [
        Column("arm", numeric=False),
        Column("learning rate"),
        Column("seed"),
        Column("how it ended", numeric=False),
        Column("why", numeric=False),
    ]
    return Table("Left out, diverged or failed", columns, rows) if rows else None
