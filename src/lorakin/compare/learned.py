"""Says when there is nothing to rank: models that answer as a constant does, or as a head alone.

Whether the models that were trained are better than a constant is a question about these models, so
the noise here is that of the rows alone. Whether other seeds would have learned is another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lorakin.compare.arms import MEMBER, PLAIN, REFERENCE
from lorakin.compare.constant import CONSTANT
from lorakin.compare.estimates import Estimate
from lorakin.compare.figures import level, plus_minus
from lorakin.compare.report_answers import words_of
from lorakin.compare.standings import Standing


def constant_runs(s: Standing) -> int:
    """Returns how many of an arm's runs answer all rows alike."""
    return sum(bool(row.answers and row.answers.is_constant) for row in s.done)


def nothing_learned(standings: Sequence[Standing]) -> bool:
    """Returns whether no arm's runs are better than a constant answer by more than the noise."""
    trained = [s for s in _trained(standings) if s.over_constant is not None]
    return bool(trained) and not any(_learned(s) for s in trained)


def no_better_than_head(standings: Sequence[Standing]) -> bool:
    """Returns whether no method is better than the head alone by more than the noise."""
    known = [s for s in _methods(standings) if s.over_head]
    return bool(known) and not any(_is_above(s.over_head) for s in known)


def said_of_nothing(standings: Sequence[Standing], measure: str) -> str:
    """Returns the sentences for `nothing_learned`."""
    trained = _trained(standings)
    runs, alike = sum(len(s.done) for s in trained), sum(map(constant_runs, trained))
    constant = next(s for s in standings if s.arm.name == CONSTANT.name)
    assert constant.quality is not None
    reached = f"{words_of(measure)} {level(constant.quality.mean, measure)}"
    if alike == runs:
        return (
            "**Nothing was learned: every model answers all rows alike**, as a constant does "
            f"({reached}). There is nothing to rank. {_advice(standings)}"
        )
    best = _best(trained, "over_constant")
    counted = f"{alike} of {runs} runs answer all rows alike. " if alike else ""
    return (
        "**Nothing was learned that can be seen: no model is better than a constant answer "
        f"({reached}) by more than the noise**, so there is nothing to rank. {counted}"
        f"{_by(best, best.over_constant, measure)} {_advice(standings)} More rows to report on "
        "(--eval-data) make the noise smaller."
    )


def said_of_head(standings: Sequence[Standing], measure: str) -> str:
    """Returns the sentences for `no_better_than_head`."""
    best = _best(_methods(standings), "over_head")
    return (
        "**No method is better than the head alone by more than the noise**: what was learned "
        "here is the new head, and the adapters add nothing that can be seen. "
        f"{_by(best, best.over_head, measure)} {_advice(standings)}"
    )


def said_of_constant_runs(standings: Sequence[Standing]) -> Iterator[str]:
    """Names the arms that answer all rows alike, where others do not."""
    alike = [(s, count) for s in _trained(standings) if (count := constant_runs(s))]
    if alike:
        named = ", ".join(f"{s.arm.title} ({count} of {len(s.done)})" for s, count in alike)
        yield f"Runs that answer all rows alike, and so learned nothing: {named}."


def _trained(standings: Sequence[Standing]) -> list[Standing]:
    return [s for s in standings if s.lr is not None and s.done]


def _methods(standings: Sequence[Standing]) -> list[Standing]:
    return [s for s in _trained(standings) if s.kind in (REFERENCE, MEMBER)]


def _learned(s: Standing) -> bool:
    return constant_runs(s) < len(s.done) and _is_above(s.over_constant)


def _is_above(difference: Estimate | None) -> bool:
    """Returns whether these runs are better by more than other rows would have changed.

    Where that is not known, the interval over the seeds decides.
    """
    if difference is None:
        return False
    known = math.isfinite(difference.half_of_rows)
    return difference.mean > (difference.half_of_rows if known else difference.half_width)


def _best(standings: Sequence[Standing], over: str) -> Standing:
    return max(
        (s for s in standings if getattr(s, over) is not None), key=lambda s: getattr(s, over).mean
    )


def _by(s: Standing, difference: Estimate | None, measure: str) -> str:
    assert difference is not None
    side = "ahead of" if difference.mean > 0 else "behind"
    return f"The best is {s.arm.title}, {side} it by {plus_minus(difference, measure)}."


def _advice(standings: Sequence[Standing]) -> str:
    """Returns what to try, with what was tried."""
    plain = standings[0]
    rate = f" (tuned {PLAIN} took {plain.lr:g}; --lr-sweep gives others)" if plain.lr else ""
    steps = f" than {plain.done[0].steps:,}" if plain.done else ""
    return f"Try a higher learning rate{rate}, more steps{steps} (--budget), or more rows."
