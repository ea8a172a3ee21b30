"""A comparison in which nothing was learned says so, and ranks nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lorakin.compare.arms import BASE, HEAD, LIMIT, MEMBER, REFERENCE, Arm
from lorakin.compare.constant import CONSTANT
from lorakin.compare.report_answers import ReportAnswers
from lorakin.compare.results import DONE, SEED, SWEEP, UNTRAINED, ResultRow, Trial
from lorakin.compare.standings import Standing, standings_of
from lorakin.compare.verdict import verdict

ROWS = 200
RIGHT = [float(n % 10 < 7) for n in range(ROWS)]


def arm(name: str, kind: str = MEMBER) -> Arm:
    return Arm(name, name, kind, "lora", 8, 2.0, lr=1e-3)


LORA, VERA, HEADS = arm("lora", REFERENCE), arm("vera"), arm(HEAD, LIMIT)
BARE = dataclasses.replace(arm(BASE, LIMIT), lr=None)


def answered(given: Sequence[float]) -> tuple[dict[str, float], ReportAnswers]:
    right = float(np.mean(np.array(given) == RIGHT))
    report = {"loss": 1 - right, "count": float(ROWS), "accuracy": right}
    return report, ReportAnswers([1 - right] * ROWS, [], RIGHT, list(given))


def run(name: str, *seeds: Sequence[float]) -> list[ResultRow]:
    found = []
    for seed, given in enumerate(seeds):
        report, answers = answered(given)
        trial = Trial(name, SEED if seed else SWEEP, 1e-3, seed)
        found.append(
            ResultRow(trial, DONE, steps=60, trained=9, tune=report, report=report, answers=answers)
        )
    return found


def wrong_on(places: Sequence[int]) -> list[float]:
    return [1 - right if n in set(places) else right for n, right in enumerate(RIGHT)]


ALWAYS = [1.0] * ROWS
GOOD, BETTER = wrong_on(range(0, 200, 10)), wrong_on(range(0, 200, 50))


def base() -> ResultRow:
    report, answers = answered([0.0] * ROWS)
    return ResultRow(Trial(BASE, UNTRAINED, None, 0), DONE, report=report, answers=answers)


def found(*rows: list[ResultRow], arms: Sequence[Arm] = (LORA, VERA, BARE)) -> list[Standing]:
    everything = [row for part in rows for row in part]
    return standings_of(list(arms), [*everything, base()], "accuracy")


def test_models_that_answer_all_rows_alike_are_not_ranked() -> None:
    alike = found(run("lora", ALWAYS, ALWAYS), run("vera", ALWAYS, ALWAYS))
    said = verdict(alike, "accuracy")
    assert "Nothing was learned" in said[0]
    assert "70.0 %" in said[0]
    assert "more steps than 60" in said[0]
    assert not any("reaches" in sentence or "would not be seen" in sentence for sentence in said)
    assert all(s.share is None for s in alike)
    one_seed = verdict(found(run("lora", ALWAYS), run("vera", ALWAYS)), "accuracy")
    assert "Nothing was learned" in one_seed[0]


def test_what_is_not_better_than_a_constant_by_more_than_the_noise_is_not_ranked() -> None:
    chance = np.random.default_rng(0)
    a, b, c, d = (
        wrong_on(chance.choice(ROWS, size, replace=False).tolist()) for size in (58, 60, 56, 61)
    )
    said = verdict(found(run("lora", a, b), run("vera", c, d)), "accuracy")
    assert "Nothing was learned that can be seen" in said[0]
    assert "vera" in said[0]


def test_one_arm_that_learned_is_enough_for_a_ranking() -> None:
    standings = found(run("lora", GOOD, GOOD), run("vera", ALWAYS, ALWAYS))
    said = verdict(standings, "accuracy")
    assert "No method beats" in said[0]
    assert "vera (2 of 2)" in " ".join(said)
    lora, vera, bare, constant = standings
    assert constant.arm == CONSTANT
    assert lora.over_constant is not None
    assert lora.over_constant.mean == 0.9 - 0.7
    # The improvement counts from the constant, not from the worse base.
    assert (lora.share, vera.share) == (1.0, 0.0)
    assert bare.share is not None
    assert bare.share < 0


def test_a_head_that_does_as_well_alone_is_told_first() -> None:
    arms = (LORA, VERA, HEADS, BARE)
    as_well = found(
        run("lora", GOOD, GOOD), run("vera", GOOD, GOOD), run(HEAD, GOOD, GOOD), arms=arms
    )
    said = verdict(as_well, "accuracy")
    assert "head alone" in said[0]
    assert not any("reaches" in sentence for sentence in said)
    behind = found(
        run("lora", BETTER, BETTER), run("vera", GOOD, GOOD), run(HEAD, GOOD, GOOD), arms=arms
    )
    said = verdict(behind, "accuracy")
    assert "No method beats" in said[0]
    assert any("Head is behind tuned lora by 8.0" in sentence for sentence in said)


def test_a_language_model_has_no_constant() -> None:
    rows = [
        ResultRow(
            Trial("lora", stage, 1e-3, seed),
            DONE,
            tune={"loss": 1.0},
            report={"loss": 1.0 + seed, "count": 9.0},
            answers=ReportAnswers([2.0, 1.0], [4, 5]),
        )
        for seed, stage in enumerate((SWEEP, SEED))
    ]
    standings = standings_of([LORA], rows, "loss")
    assert [s.arm.name for s in standings] == ["lora"]
    assert standings[0].over_constant is None


def test_runs_that_learned_are_not_nothing_where_seeds_differ_much() -> None:
    """One seed learned more than the other: that noise is not the question here."""
    standings = found(run("lora", GOOD, BETTER), run("vera", ALWAYS, ALWAYS))
    assert standings[0].over_constant is not None
    assert not standings[0].over_constant.excludes_zero
    assert "Nothing was learned" not in verdict(standings, "accuracy")[0]
    one_seed = found(run("lora", GOOD), run("vera", ALWAYS))
    assert "One seed" in verdict(one_seed, "accuracy")[0]
