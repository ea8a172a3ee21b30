"""The survey's claims, each with the paper's figure and a verdict on it from the study.

Verdicts: **shown** (the interval proves it), **refuted** (the interval proves the opposite, or that
the difference is smaller than a point), **not told apart**, **not testable here**.
"""

from __future__ import annotations

import dataclasses
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
SAVES = 0.95
"""An arm that needs at most this part of LoRA's time or memory needs less."""

Found = tuple[str, str]
"""What was measured, and the verdict."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """A claim.

    Attributes:
        member: the member that it is about.
        claim: in our words.
        paper: the paper's figure and setting.
        measured: returns what was measured and the verdict.
    """

    member: str
    claim: str
    paper: str
    measured: Callable[[Sequence[Evidence]], Found]


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
    return {title: d for title, d in found.items() if d is not None and math.isfinite(d.half)}


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


def better(name: str, other: str = "lora") -> Callable[[Sequence[Evidence]], Found]:
    """Judges that an arm is better than another."""

    def measured(evidence: Sequence[Evidence]) -> Found:
        shown, deciding = compared(evidence, name, other)
        return shown, _judged(deciding, holds={BETTER}, fails={SAME, WORSE})

    return measured


def on_par(name: str, other: str = "lora") -> Callable[[Sequence[Evidence]], Found]:
    """Judges that an arm is no worse than another by a point."""

    def measured(evidence: Sequence[Evidence]) -> Found:
        shown, deciding = compared(evidence, name, other)
        return shown, _together({title: _is_on_par(d) for title, d in deciding.items()})

    return measured


def _is_on_par(d: Difference) -> str:
    return SHOWN if d.is_no_worse else REFUTED if d.high < -d.margin else OPEN


def below(name: str, other: str = "lora") -> Callable[[Sequence[Evidence]], Found]:
    """Judges that an arm is worse than another."""

    def measured(evidence: Sequence[Evidence]) -> Found:
        shown, deciding = compared(evidence, name, other)
        return shown, _judged(deciding, holds={WORSE}, fails={SAME, BETTER})

    return measured


def equal(name: str, other: str) -> Callable[[Sequence[Evidence]], Found]:
    """Judges that two arms are the same within a point."""

    def measured(evidence: Sequence[Evidence]) -> Found:
        shown, deciding = compared(evidence, name, other)
        return shown, _judged(deciding, holds={SAME}, fails={BETTER, WORSE})

    return measured


def _judged(deciding: Mapping[str, Difference], holds: set[str], fails: set[str]) -> str:
    return _together(
        {
            title: SHOWN if d.verdict in holds else REFUTED if d.verdict in fails else OPEN
            for title, d in deciding.items()
        }
    )


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


def share_of(name: str, figure: str, most: float) -> Callable[[Sequence[Evidence]], Found]:
    """Judges that an arm has at most a part of LoRA's trained parameters, time or memory."""

    def measured(evidence: Sequence[Evidence]) -> Found:
        shares = {e.task.title: ratio(e, name, figure) for e in evidence}
        known = {title: share for title, share in shares.items() if share is not None}
        shown = "; ".join(f"{title} {share:.2f}" for title, share in known.items())
        held = [share <= most for share in known.values()]
        return shown, _of_tasks(held)

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


def sooner(name: str, least: float) -> Callable[[Sequence[Evidence]], Found]:
    """Judges that an arm reaches LoRA's last held-out loss in fewer steps.

    For each seed: LoRA's steps over the steps at which the arm's curve falls below LoRA's best loss,
    between evaluations on a straight line. Where it never does, the seed counts as 1 over "never".
    """

    def measured(evidence: Sequence[Evidence]) -> Found:
        parts, judged = [], []
        for e in evidence:
            runs = gains(e, name)
            found = [gain for gain in runs if gain is not None]
            missed = len(runs) - len(found)
            if not runs:
                continue
            if not found or missed > len(found):
                parts.append(f"{e.task.title} never in {missed} of {missed + len(found)} runs")
                judged.append(False)
                continue
            low, high = min(found), max(found)
            mean = statistics.fmean(found)
            never = f", never in {missed}" if missed else ""
            parts.append(f"{e.task.title} {mean:.2f}× ({low:.2f}–{high:.2f}{never})")
            judged.append(low >= least and not missed)
        return "; ".join(parts), _of_tasks(judged)

    return measured


def gains(e: Evidence, name: str) -> list[float | None]:
    """Returns for each seed LoRA's steps over those that an arm needs; None where it never does."""
    if name not in e.standings:
        return []
    plain = {row.trial.seed: row.curve for row in e.standings["lora"].done}
    found = []
    for row in e.standings[name].done:
        curve = plain.get(row.trial.seed)
        if curve and row.curve:
            best = min(curve, key=lambda point: point[1])
            step = reached(row.curve, best[1])
            found.append(best[0] / step if step else None)
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


def correlations(
    part: str, holds: Callable[[float, float, float], bool]
) -> Callable[[Sequence[Evidence]], Found]:
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


STATEMENTS: Sequence[Statement] = (
    Statement("lora", "LoRA is on par with full fine-tuning", "RoBERTa-base on GLUE: 86.6 and 85.2", on_par("lora", "full")),
    Statement("lora+", "LoRA+ is better than LoRA", "1–2 % (abstract)", better("lora+")),
    Statement("lora+", "LoRA+ needs half of LoRA's steps", "up to about 2× (abstract)", sooner("lora+", 1.5)),
    Statement("lora+", "LoRA+ is LoRA with alpha × 16 (theory, Adam)", "none", equal("lora+", "lora-alpha-x16")),
    Statement("vera", "VeRA trains 97 % fewer parameters", "GPT-3, rank 16: 3.1 % are left", share_of("vera", "trained", 0.031)),
    Statement("vera", "VeRA is slightly below LoRA", "GLUE: 85.2 and 86.6; E2E: ahead", below("vera")),
    Statement("vera", "VeRA is better than LoRA with as many parameters", "none", better("vera", "lora-few")),
    Statement("lora-fa", "LoRA-FA trains half of LoRA's parameters", "half", share_of("lora-fa", "trained", 0.505)),
    Statement("lora-fa", "LoRA-FA is on par with LoRA", "on par", on_par("lora-fa")),
    Statement("lora-fa", "LoRA-FA needs less memory", "up to 1.4× less", share_of("lora-fa", "memory", SAVES)),
    Statement("lora-drop", "LoRA-drop keeps half of the modules and is on par", "on par at about 50 %", on_par("lora-drop")),
    Statement("lora-drop", "LoRA-drop takes less time", "much less (third parties)", share_of("lora-drop", "time", SAVES)),
    Statement("lora-drop", "The modules it chooses are better than random ones", "better", better("lora-drop", "lora-drop-random-1")),
    Statement("adalora", "AdaLoRA is better than LoRA at one final budget", "better", better("adalora")),
    Statement("adalora", "AdaLoRA gives more rank to FFN layers, and to upper layers", "both (figure 3)", ranks_moved),
    Statement("dora", "DoRA is better than LoRA", "LLaMA-7B: 78.4 and 74.7 (76.3 in the authors' later list)", better("dora")),
    Statement("dora", "DoRA at half of LoRA's rank is better than LoRA", "LLaMA-7B: 77.5 and 74.7", better("dora-half-rank")),
    Statement("dora", "LoRA's ΔM and ΔD of query weights go together, and not those of full training (full / LoRA / DoRA)", "−0.62 / +0.83 / −0.31", correlations("q", lambda full, plain, split: full < 0 < plain)),
    Statement("dora", "DoRA's are more like those of full training than LoRA's are", "−0.62 / +0.83 / −0.31", correlations("q", lambda full, plain, split: abs(split - full) < abs(plain - full))),
    Statement("delta-lora", "Delta-LoRA is better than LoRA", "better", better("delta-lora")),
    Statement("delta-lora", "Delta-LoRA is LoRA with alpha × 3 (theory, Adam, K = 0)", "none", equal("delta-lora", "lora-alpha-x3")),
    Statement("pissa", "PiSSA is better than LoRA", "better", better("pissa")),
    Statement("olora", "OLoRA is better than LoRA", "better", better("olora")),
    Statement("lora-xs", "LoRA-XS is on par with LoRA", "on par", on_par("lora-xs")),
    Statement("eva", "EVA is better than LoRA", "better", better("eva")),
    Statement("lora-ga", "LoRA-GA is better than LoRA", "better", better("lora-ga")),
)  # fmt: skip
