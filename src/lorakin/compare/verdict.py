"""Says in plain words what the figures of a comparison support, and no more."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from lorakin.compare.arms import BASE, CONTROL, FULL, HEAD, MEMBER, PLAIN
from lorakin.compare.constant import CONSTANT
from lorakin.compare.estimates import Estimate
from lorakin.compare.figures import amount, interval, margin_of, percent, plus_minus
from lorakin.compare.learned import (
    no_better_than_head,
    nothing_learned,
    said_of_constant_runs,
    said_of_head,
    said_of_nothing,
)
from lorakin.compare.results import DIVERGED
from lorakin.compare.standings import Standing, leaders, paired_difference

ENOUGH, THRIFTY, LEAN = 0.9, 0.5, 0.95
"""A method that reaches 90 % of plain LoRA's improvement is named as thrifty if it trains at most
half as many parameters, and as lean if all its runs need less than 95 % of the memory."""


def verdict(standings: Sequence[Standing], measure: str) -> list[str]:
    """Returns sentences, the most important first; **bold** marks the parts to read first.

    Args:
        standings: where the arms stand; the first is plain LoRA.
        measure: "loss", or the metric that decides.
    """
    reference = standings[0]
    if reference.quality is None:
        return [f"**There is nothing to compare with yet**: tuned {PLAIN} has no finished run."]
    if nothing_learned(standings):
        return [said_of_nothing(standings, measure), *_troubles(standings)]
    if reference.quality.count < 2:
        return [
            "**One seed cannot tell a difference from noise**, so this does not say which method "
            f"is better than tuned {PLAIN}; compare with --seeds 3 or more.",
            *said_of_constant_runs(standings),
            *_troubles(standings),
        ]
    members = [s for s in standings if s.kind == MEMBER and s.ahead is not None]
    by_head = no_better_than_head(standings)
    return [
        *_headroom(standings),
        *([said_of_head(standings, measure)] if by_head else []),
        _leaders(members, reference.quality, measure),
        *_same(members, measure),
        *_worse(members, measure),
        *([] if by_head else [*_thrifty(members, reference), *_lean(members)]),
        *said_of_constant_runs(standings),
        *_controls(standings, measure),
        *_limits(standings, measure),
        *_troubles(standings),
    ]


def _headroom(standings: Sequence[Standing]) -> Iterator[str]:
    """Warns if plain LoRA learns nothing: then no method can be told from another."""
    or_constant = ""
    if any(s.arm.name == CONSTANT.name for s in standings):
        or_constant = ", or than a constant answer,"
    if standings[0].share is None and any(s.arm.name == BASE and s.quality for s in standings):
        yield (
            f"**Tuned {PLAIN} is not better than the untrained base{or_constant} by more than the "
            "noise**, so this budget on this data cannot tell methods apart: train longer, or on "
            "more rows."
        )


def _leaders(members: Sequence[Standing], plain: Estimate, measure: str) -> str:
    """Says which methods beat plain LoRA."""
    if not members:
        return (
            f"**No other method has finished yet**, so there is nothing to compare tuned {PLAIN} "
            "with."
        )
    best = leaders(members)
    if best:
        leads = "; ".join(
            f"{s.arm.title} by {amount(s.ahead.mean, measure)} ({interval(s.ahead, measure)})"
            for s in best
            if s.ahead
        )
        lead = f"**Better than tuned {PLAIN} by more than the noise: {leads}.**"
    else:
        lead = (
            f"**No method beats tuned {PLAIN} by more than the noise.** "
            f"{_unseen(members, plain, measure)}"
        )
    perhaps = [
        f"{s.arm.title} ({amount(s.ahead.mean, measure)})"
        for s in members
        if s not in best and s.ahead and s.ahead.mean > 0 and s.ahead.excludes_zero
    ]
    if perhaps:
        lead += (
            f" The interval of {', '.join(perhaps)} lies above zero, but among {len(members)} "
            "comparisons that can be chance; more seeds would tell."
        )
    return lead


def _unseen(members: Sequence[Standing], plain: Estimate, measure: str) -> str:
    """Says how large a difference would have been seen."""
    limit = statistics.median(s.ahead.half_width for s in members if s.ahead)
    if not limit:
        return "Most of them answer every row as it does."
    rows = f" and {plain.drawn} to report on" if plain.rows else ""
    return (
        f"With {plain.count} seeds{rows}, most differences below about {amount(limit, measure)} "
        "would not be seen."
    )


def _same(members: Sequence[Standing], measure: str) -> Iterator[str]:
    """Names the methods whose whole interval lies within what counts as no difference."""
    margin = margin_of(measure)
    same = [
        s.arm.title
        for s in members
        if margin and s.ahead and abs(s.ahead.mean) + s.ahead.half_width < margin
    ]
    if same and margin:
        yield (
            f"The same as tuned {PLAIN} to within {amount(margin, measure)}: {', '.join(same)} "
            "(the whole 95 % interval lies there)."
        )


def _worse(members: Sequence[Standing], measure: str) -> Iterator[str]:
    behind = [
        f"{s.arm.title} (by {amount(-s.ahead.mean, measure)})"
        for s in members
        if s.ahead and s.ahead.mean < 0 and s.ahead.excludes_zero
    ]
    if behind:
        yield f"Worse than tuned {PLAIN} by more than the noise: {', '.join(behind)}."


def _thrifty(members: Sequence[Standing], reference: Standing) -> Iterator[str]:
    """Names the method that does nearly as well with the fewest trained parameters."""
    able = [(s.trained, s) for s in members if s.trained and (s.share or 0) >= ENOUGH]
    trained, least = min(able, key=lambda pair: pair[0], default=(0, None))
    if least is None or not reference.trained or trained > THRIFTY * reference.trained:
        return
    frozen = least.done[0].frozen
    yield (
        f"{least.arm.title} reaches {percent(least.share or 0)} of tuned {PLAIN}'s improvement "
        f"with {percent(trained / reference.trained, 1)} of its trained parameters"
        + (f", and stores {frozen:,} frozen ones." if frozen else ".")
    )


def _lean(members: Sequence[Standing]) -> Iterator[str]:
    """Names the method that does nearly as well with the least memory."""
    able = [
        (s.memory.median, s)
        for s in members
        if s.memory and s.memory.high < LEAN and (s.share or 0) >= ENOUGH
    ]
    memory, least = min(able, key=lambda pair: pair[0], default=(0.0, None))
    if least is not None:
        yield (
            f"{least.arm.title} reaches {percent(least.share or 0)} of tuned {PLAIN}'s improvement "
            f"with {memory:.2f} of its memory."
        )


def _controls(standings: Sequence[Standing], measure: str) -> Iterator[str]:
    """Compares what is the same in theory with what was measured."""
    for control in standings:
        explained = next((s for s in standings if s.arm.name == control.arm.explains), None)
        if control.kind != CONTROL or explained is None:
            continue
        difference = paired_difference(explained.rows, control.rows, measure)
        if difference is None or difference.count < 2:
            continue
        same = "they differ" if difference.excludes_zero else "they are the same within the noise"
        title, by = explained.arm.title, plus_minus(difference, measure)
        yield (
            f"In theory {title} is {control.arm.title} under Adam: here {same} "
            f"({title} is {_side(difference)} by {by})."
        )


def _limits(standings: Sequence[Standing], measure: str) -> Iterator[str]:
    for s in standings:
        if s.arm.name in (FULL, HEAD) and s.ahead and s.ahead.count >= 2:
            noise = "" if s.ahead.excludes_zero else ", within the noise"
            side = "ahead of" if s.ahead.mean > 0 else "behind"
            by = f"{plus_minus(s.ahead, measure)}{noise}"
            yield f"{s.arm.title.capitalize()} is {side} tuned {PLAIN} by {by}."


def _side(difference: Estimate) -> str:
    return "ahead" if difference.mean > 0 else "behind"


def _troubles(standings: Sequence[Standing]) -> Iterator[str]:
    """Names what was left out and what did not end well: nothing is dropped silently."""
    for s in standings:
        if s.refused:
            yield f"**Left out**: {s.arm.title}, because {s.refused}"
        elif s.failed_trials and not s.done:
            yield f"**No run of {s.arm.title} ended well**: {s.failed_trials[0].reason}"

    diverged = {
        s.arm.title: sum(row.status == DIVERGED for row in s.failed_trials) for s in standings
    }
    if names := ", ".join(f"{title} ({count})" for title, count in diverged.items() if count):
        yield (
            "Trials that diverged, which stay in the results and count against their learning "
            f"rate: {names}."
        )
    for s in standings:
        if failed := [row for row in s.failed_trials if row.status != DIVERGED]:
            yield f"{len(failed)} trials of {s.arm.title} failed: {failed[0].reason}"
    if edges := ", ".join(s.arm.title for s in standings if s.at_edge):
        yield (
            f"The best learning rate is at the edge of the sweep for {edges}: a better one may lie "
            "beyond it."
        )
