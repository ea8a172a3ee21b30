"""Judges of the survey's claims: each returns what was measured, and a verdict on it.

Verdicts: **shown** (the interval proves it), **refuted** (the interval proves the opposite), **the
same** (it proves that the two lie within a point), **not told apart**.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from benchmarks.claims.analysis import Difference, Evidence, over_tasks
from lorakin.compare.prior import BETTER, SAME, WORSE
from lorakin.compare.report_answers import LOSS
from lorakin.report.magnitude_direction import Point, correlation

SHOWN, REFUTED, OPEN, MISSING = "shown", "refuted", "not told apart", "not run"
ELSEWHERE = "holds at other widths and ranks"
"""The verdict on a number that follows from a model's shape."""
SAVES = 0.95
"""An arm that needs at most this part of LoRA's time or memory needs less."""

Found = tuple[str, str]
"""What was measured, and the verdict."""
Judge = Callable[[Sequence[Evidence]], Found]


def written(d: Difference, unit: str) -> str:
    """Writes a difference with its interval, as +0.4 (−0.3 to +1.1)."""

    def signed(value: float) -> str:
        digits = 1 if unit == "points" else 3
        return f"{value:+.{digits}f}".replace("-", "−")

    return f"{signed(d.mean)} ({signed(d.low)} to {signed(d.high)})"


def unit_of(e: Evidence) -> str:
    """Returns the unit of a task's differences."""
    return "nats" if e.task.measure == LOSS else "points"


def differences(evidence: Sequence[Evidence], name: str, other: str) -> dict[str, Difference]:
    """Returns task → how far an arm is ahead of another there."""
    found = {e.task.title: e.difference(name, other) for e in evidence}
    return {title: d for title, d in found.items() if d is not None}


def compared(
    evidence: Sequence[Evidence], name: str, other: str
) -> tuple[str, dict[str, Difference]]:
    """Returns the differences in words, and those that decide: the mean in points, and each loss."""
    by_task = differences(evidence, name, other)
    kinds = {e.task.title: unit_of(e) for e in evidence}
    points = {title: d for title, d in by_task.items() if kinds[title] == "points"}
    deciding = {title: d for title, d in by_task.items() if kinds[title] == "nats"}
    parts = [f"{title} {written(d, kinds[title])}" for title, d in by_task.items()]
    if len(points) > 1:
        mean = over_tasks(list(points.values()))
        parts.insert(0, f"**mean of {len(points)} tasks {written(mean, 'points')} points**")
        points = {"mean": mean}
    return "; ".join(parts), points | deciding


def better(name: str, *others: str) -> Judge:
    """Judges that an arm is better than LoRA, or than each of some others."""
    return _compares(name, others or ("lora",), {BETTER: SHOWN, SAME: SAME, WORSE: REFUTED})


def on_par(name: str, other: str = "lora") -> Judge:
    """Judges that an arm is no worse than another by a point."""

    def measured(evidence: Sequence[Evidence]) -> Found:
        shown, deciding = compared(evidence, name, other)
        return shown, _together({title: _is_on_par(d) for title, d in deciding.items()})

    return measured


def _is_on_par(d: Difference) -> str:
    return SHOWN if d.is_no_worse else REFUTED if d.high < -d.margin else OPEN


def below(name: str) -> Judge:
    """Judges that an arm is worse than LoRA."""
    return _compares(name, ("lora",), {WORSE: SHOWN, SAME: SAME, BETTER: REFUTED})


def equal(name: str, other: str) -> Judge:
    """Judges that two arms are the same within a point."""
    return _compares(name, (other,), {SAME: SHOWN, BETTER: REFUTED, WORSE: REFUTED})


def _compares(name: str, others: Sequence[str], words: Mapping[str, str]) -> Judge:
    """Judges differences from other arms by what the verdict on a difference says of the claim."""

    def measured(evidence: Sequence[Evidence]) -> Found:
        parts, verdicts = [], {}
        for number, other in enumerate(others, start=1):
            shown, deciding = compared(evidence, name, other)
            of = f" ({number} of {len(others)})" if len(others) > 1 else ""
            parts += [shown] if shown else []
            verdicts |= {title + of: words.get(d.verdict, OPEN) for title, d in deciding.items()}
        return "; and ".join(parts), _together(verdicts)

    return measured


def _together(verdicts: Mapping[str, str]) -> str:
    """Returns the one verdict, or each with its task where they differ.

    >>> _together({"SST-2": "refuted", "E2E NLG": "not told apart"})
    'SST-2: refuted; E2E NLG: not told apart'
    """
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    return "; ".join(f"{title}: {verdict}" for title, verdict in verdicts.items()) or MISSING


def _of_tasks(held: Sequence[bool]) -> str:
    """Returns the verdict on a claim that was looked at on each task alone."""
    if not held:
        return MISSING
    return SHOWN if all(held) else REFUTED if not any(held) else f"on {sum(held)} of {len(held)}"


def share_of(name: str, figure: str, most: float, otherwise: str = "") -> Judge:
    """Judges that an arm has at most a part of LoRA's trained parameters, time or memory.

    Args:
        name: the arm.
        figure: "trained", "time" or "memory".
        most: the part.
        otherwise: the verdict where it has more, if that does not refute the claim.
    """

    def measured(evidence: Sequence[Evidence]) -> Found:
        shares = {e.task.title: ratio(e, name, figure) for e in evidence}
        known = {title: share for title, share in shares.items() if share is not None}
        shown = "; ".join(f"{title} {share:.2f}" for title, share in known.items())
        verdict = _of_tasks([share <= most for share in known.values()])
        return shown, otherwise if otherwise and verdict not in (SHOWN, MISSING) else verdict

    return measured


def ratio(e: Evidence, name: str, figure: str) -> float | None:
    """Returns an arm's `trained`, `time` or `memory` as a multiple of plain LoRA's."""
    standing, plain = e.standings.get(name), e.standings["lora"]
    if standing is None or not standing.done:
        return None
    if figure == "trained":
        return (standing.trained or 0) / (plain.trained or 1)
    found = getattr(standing, figure)
    return None if found is None else float(found.median)


def sooner(name: str, least: float) -> Judge:
    """Judges that an arm reaches LoRA's last held-out loss in fewer steps.

    For each seed: LoRA's steps over the steps at which the arm's curve falls to LoRA's best loss,
    between evaluations on a straight line; 0 where it never does. Shown if every seed has at least
    `least`, refuted if none has.
    """

    def measured(evidence: Sequence[Evidence]) -> Found:
        parts, verdicts = [], {}
        for e in evidence:
            found = sorted(gains(e, name))
            if found:
                figures = (statistics.median_low(found), found[0], found[-1])
                middle, low, high = (f"{x:.2f}×" if x else "never" for x in figures)
                parts.append(f"{e.task.title} {middle} ({low} to {high})")
                held = sum(gain >= least for gain in found)
                verdicts[e.task.title] = SHOWN if held == len(found) else OPEN if held else REFUTED
        return "; ".join(parts), _together(verdicts)

    return measured


def gains(e: Evidence, name: str) -> list[float]:
    """Returns for each seed LoRA's steps over those that an arm needs; 0 where it never does."""
    if name not in e.standings:
        return []
    plain = {row.trial.seed: row.curve for row in e.standings["lora"].done}
    found = []
    for row in e.standings[name].done:
        curve = plain.get(row.trial.seed)
        if curve and row.curve:
            best = min(curve, key=lambda point: point[1])
            step = reached(row.curve, best[1])
            found.append(best[0] / step if step else 0.0)
    return found


def reached(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Returns the step at which a curve falls to a loss, None if it never does.

    >>> reached([(10, 3.0), (20, 2.0)], 2.5)
    15.0
    """
    before: tuple[float, float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (step, value)
    return None


def correlations(part: str, holds: Callable[[float, float, float], bool]) -> Judge:
    """Judges how the changes of magnitude and direction go together in full training, LoRA, DoRA.

    Args:
        part: what the paths of the weights have in them.
        holds: whether the claim holds for their three correlations, each the mean over seeds.
    """

    def measured(evidence: Sequence[Evidence]) -> Found:
        parts, judged = [], []
        for e in evidence:
            found = [magnitude_direction(e, name, part) for name in ("full", "lora", "dora")]
            if all(found):
                said = " / ".join(_signed(statistics.fmean(runs)) for runs in found)
                ends = ", ".join(f"{_signed(min(r))} to {_signed(max(r))}" for r in found)
                parts.append(f"{e.task.title} {said} (seeds {ends})")
                judged.append(holds(*map(statistics.fmean, found)))
        return "; ".join(parts), _of_tasks(judged)

    return measured


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def magnitude_direction(e: Evidence, name: str, part: str) -> list[float]:
    """Returns for each seed the correlation of ΔM and ΔD over a run, of all weights of a part."""
    found = []
    for row in e.standings[name].done if name in e.standings else ():
        points = [
            Point(name, "", path, step, *move)
            for step, moves in row.moves
            for path, move in moves.items()
            if part in path
        ]
        if points:
            found.append(correlation(points).r)
    return found


ATTENTION = ("query", "key", "value", "attention", "q_proj", "k_proj", "v_proj", "o_proj")
"""What the paths of attention's layers have in them; FFN layers have none of it."""


def mean_rank(runs: Sequence[Mapping[str, int]], paths: Iterable[str]) -> float:
    """Returns the mean rank of these modules over runs, each of which is path → rank.

    >>> mean_rank([{"a": 2, "b": 9}, {"a": 4, "b": 9}], ["a"])
    3.0
    """
    return statistics.fmean(ranks[path] for path in paths for ranks in runs)


def ranks_moved(evidence: Sequence[Evidence]) -> Found:
    """Says where AdaLoRA's ranks go, and how well seeds agree."""
    parts, judged = [], []
    for e in evidence:
        runs = e.standings["adalora"].done if "adalora" in e.standings else []
        last = [dict(row.ranks[-1][1]) for row in runs if row.ranks]
        if not last:
            continue
        numbers = {path: re.search(r"layers?\.(\d+)\.", path) for path in last[0]}
        layers = {path: int(found[1]) for path, found in numbers.items() if found}
        half = max(layers.values()) / 2
        attention = [path for path in layers if any(word in path for word in ATTENTION)]
        kinds = mean_rank(last, layers.keys() - {*attention}), mean_rank(last, attention)
        upper = [path for path, number in layers.items() if number > half]
        halves = mean_rank(last, upper), mean_rank(last, layers.keys() - {*upper})
        table = np.corrcoef([[ranks[path] for path in sorted(ranks)] for ranks in last])
        agree = table[np.triu_indices(len(last), 1)].mean() if len(last) > 1 else math.nan
        parts.append(
            f"{e.task.title} FFN {kinds[0]:.1f}, attention {kinds[1]:.1f}; upper half of the layers "
            f"{halves[0]:.1f}, lower half {halves[1]:.1f}; seeds agree at r = {agree:.2f}"
        )
        judged += [kinds[0] > kinds[1], halves[0] > halves[1]]
    return "; ".join(parts), _of_tasks(judged)
