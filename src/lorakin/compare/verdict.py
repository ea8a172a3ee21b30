"""What a comparison says, in plain words: no more than its figures do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from lorakin.compare.arms import BASE, CONTROL, FULL, HEAD, MEMBER, PLAIN
from lorakin.compare.results import DIVERGED
from lorakin.compare.standings import Estimate, Standing, apart, leaders

ENOUGH, THRIFTY = 0.9, 0.5
"""A thrifty method reaches so much of plain LoRA's improvement with at most so many of its numbers."""


def verdict(found: Sequence[Standing], measure: str) -> list[str]:
    """Sentences, the most important first; **bold** marks what to read if nothing else is."""
    reference = found[0]
    if reference.quality is None:
        return [f"**There is nothing to compare with yet**: tuned {PLAIN} has no finished run."]
    members = [s for s in found if s.kind == MEMBER and s.ahead is not None]
    if reference.quality.count < 2:
        return [
            f"**One seed tells no noise from difference**, so nothing is said of which method is better than tuned {PLAIN}; "
            "compare with --seeds 3 or more.",
            *_troubles(found),
        ]
    said = [
        *_headroom(found),
        _leaders(members, reference, measure),
        *_worse(members, measure),
        *_thrifty(members, reference),
        *_lean(members),
    ]
    said += [
        sentence for s in found if s.kind == CONTROL for sentence in _control(s, found, measure)
    ]
    said += [
        sentence for s in found if s.arm.name in (FULL, HEAD) for sentence in _limit(s, measure)
    ]
    return said + _troubles(found)


def amount(value: float, measure: str) -> str:
    """A value of the measure, or a difference of two, as people write it."""
    return f"{100 * value:.1f} points" if measure == "accuracy" else f"{value:.3f}"


def percent(share: float, digits: int = 0) -> str:
    """A share as people write it."""
    return f"{100 * share + 0.0:.{digits}f} %".replace("-0 %", "0 %")


def interval(estimate: Estimate, measure: str) -> str:
    """The interval in words."""
    low, high = estimate.mean - estimate.half, estimate.mean + estimate.half
    return f"95 % interval {amount(low, measure)} to {amount(high, measure)}"


def with_interval(estimate: Estimate, measure: str, signed: bool = False) -> str:
    """A value, or if `signed` a difference, and half of its interval where it has one."""
    sign = ("−" if estimate.mean < 0 else "+") if signed else ""
    mean = (
        f"{100 * estimate.mean:.1f} %"
        if measure == "accuracy" and not signed
        else amount(abs(estimate.mean), measure)
    )
    return f"{sign}{mean}" + (
        f" ± {amount(estimate.half, measure)}" if math.isfinite(estimate.half) else ""
    )


def _leaders(members: Sequence[Standing], reference: Standing, measure: str) -> str:
    seeds = reference.quality.count if reference.quality else 0
    if not members:
        return f"**There is nothing beside tuned {PLAIN}** that has finished, so there is nothing to compare it with."
    best = leaders(members)
    perhaps = [
        s
        for s in members
        if s not in best and s.ahead and s.ahead.mean > 0 and s.ahead.excludes_zero
    ]
    if best:
        leads = [(s.arm.title, s.ahead) for s in best if s.ahead]
        names = "; ".join(
            f"{title} by {amount(by.mean, measure)} ({interval(by, measure)})"
            for title, by in leads
        )
        lead = f"**Better than tuned {PLAIN} by more than the noise: {names}.**"
    else:
        limit = statistics.median(s.ahead.half for s in members if s.ahead)
        lead = (
            f"**No method beats tuned {PLAIN} by more than the noise.** With {seeds} seeds, a difference below about "
            f"{amount(limit, measure)} would mostly not be seen."
        )
    if perhaps:
        names = ", ".join(
            f"{s.arm.title} ({amount(s.ahead.mean, measure)})" for s in perhaps if s.ahead
        )
        lead += (
            f" Taken alone, the interval of {names} lies above zero; among {len(members)} comparisons that can be chance, and "
            "more seeds would tell."
        )
    return lead


def _headroom(found: Sequence[Standing]) -> list[str]:
    if found[0].share is not None or not any(s.arm.name == BASE and s.quality for s in found):
        return []
    return [
        f"**Tuned {PLAIN} is not better than the untrained base by more than the noise**, so this budget on this data cannot "
        "tell methods apart: train longer, or on more rows."
    ]


def _worse(members: Sequence[Standing], measure: str) -> list[str]:
    behind = [s for s in members if s.ahead and s.ahead.mean < 0 and s.ahead.excludes_zero]
    if not behind:
        return []
    names = ", ".join(
        f"{s.arm.title} (by {amount(-s.ahead.mean, measure)})" for s in behind if s.ahead
    )
    return [f"Behind it by more than the noise: {names}."]


def _thrifty(members: Sequence[Standing], reference: Standing) -> list[str]:
    plain = reference.trained
    able = [s for s in members if plain and s.trained and s.share is not None and s.share >= ENOUGH]
    least = min(able, key=lambda s: s.trained or 0, default=None)
    if plain is None or least is None or least.trained is None or least.trained > THRIFTY * plain:
        return []
    frozen = (
        f", and keeps {least.done[0].frozen:,} frozen ones beside them"
        if least.done[0].frozen
        else ""
    )
    return [
        f"{least.arm.title} reaches {percent(least.share or 0)} of tuned {PLAIN}'s improvement over the base with "
        f"{percent(least.trained / plain, 1)} of its trained numbers{frozen}."
    ]


def _lean(members: Sequence[Standing]) -> list[str]:
    lean = [
        s
        for s in members
        if s.memory and s.memory.high < 0.95 and s.share is not None and s.share >= ENOUGH
    ]
    if not lean:
        return []
    least = min(lean, key=lambda s: s.memory.median if s.memory else 1.0)
    assert least.memory
    kept = f"keeps {percent(least.share or 0)} of its improvement"
    return [
        f"{least.arm.title} trains in {least.memory.median:.2f} of tuned {PLAIN}'s memory and {kept}."
    ]


def _control(control: Standing, found: Sequence[Standing], measure: str) -> list[str]:
    """What an arm is by theory, beside what it was measured to be."""
    twin = next((s for s in found if s.arm.name == control.arm.explains), None)
    difference = None if twin is None else apart(twin.rows, control.rows, measure)
    if twin is None or difference is None or difference.count < 2:
        return []
    same = (
        "here they differ"
        if difference.excludes_zero
        else "here they are the same within the noise"
    )
    return [
        f"By theory {twin.arm.title} comes to {control.arm.title} under Adam: {same} ({_side(difference)} by "
        f"{amount(abs(difference.mean), measure)} ± {amount(difference.half, measure)})."
    ]


def _limit(limit: Standing, measure: str) -> list[str]:
    if limit.ahead is None or limit.ahead.count < 2:
        return []
    noise = "" if limit.ahead.excludes_zero else ", within the noise"
    by = f"{amount(abs(limit.ahead.mean), measure)} ± {amount(limit.ahead.half, measure)}"
    return [
        f"{limit.arm.title.capitalize()} is {_side(limit.ahead)} of tuned {PLAIN} by {by}{noise}."
    ]


def _side(difference: Estimate) -> str:
    return "ahead" if difference.mean > 0 else "short"


def _troubles(found: Sequence[Standing]) -> list[str]:
    said = []
    for s in found:
        if s.refused:
            said.append(f"**Left out**: {s.arm.title}, because {s.refused}")
        elif s.ended and not s.done:
            said.append(f"**No run of {s.arm.title} ended well**: {s.ended[0].reason}")
    diverged = {s.arm.title: sum(row.status == DIVERGED for row in s.ended) for s in found}
    if names := ", ".join(f"{title} ({count})" for title, count in diverged.items() if count):
        said.append(
            f"Trials that diverged, kept in the results and counted against their learning rate: {names}."
        )
    failed = {s.arm.title: [row for row in s.ended if row.status != DIVERGED] for s in found}
    said += [
        f"{len(rows)} trials of {title} failed: {rows[0].reason}"
        for title, rows in failed.items()
        if rows and found
    ]
    if edges := ", ".join(s.arm.title for s in found if s.at_edge):
        said.append(
            f"The best learning rate lies at the edge of the sweep for {edges}: it may not be the best there is."
        )
    return said
