"""Means, intervals, differences and the verdict, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from lorakin.compare.arms import BASE, CONTROL, FULL, LIMIT, MEMBER, REFERENCE, Arm
from lorakin.compare.estimates import Estimate, Ratio, holm
from lorakin.compare.results import DIVERGED, DONE, SEED, SWEEP, UNTRAINED, ResultRow, Trial
from lorakin.compare.standings import leaders, standings_of
from lorakin.compare.verdict import verdict


def arm(name: str, kind: str = MEMBER, **more: Any) -> Arm:
    return Arm(name, name, kind, "lora", 8, 2.0, lr=1e-3, **more)


def rows(name: str, values: list[float], measure: str = "loss", **figures: Any) -> list[ResultRow]:
    """One rate, and a seed for each value."""
    found = []
    for seed, value in enumerate(values):
        report = {measure: value} if measure == "loss" else {measure: value, "loss": 1 - value}
        trial = Trial(name, SEED if seed else SWEEP, 1e-3, seed)
        found.append(ResultRow(trial, DONE, tune=report, report=report, **figures))
    return found


PLAIN, BARE = arm("lora", REFERENCE), dataclasses.replace(arm(BASE, LIMIT), lr=None)


def base(value: float, measure: str = "loss") -> ResultRow:
    return ResultRow(Trial(BASE, UNTRAINED, None, 0), DONE, report={measure: value})


def test_the_interval_is_student_s() -> None:
    found = Estimate.of([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(
        4.302653 / math.sqrt(3), rel=1e-6
    )  # t of 2 degrees of freedom, from a table
    assert not found.excludes_zero
    assert found.p == pytest.approx(0.0741799, abs=1e-6)  # t = 2·√3, two-sided
    assert math.isinf(Estimate.of([1.0]).half_width)
    assert Estimate.of([1.0]).p == 1.0
    assert Estimate.of([0.5, 0.5]).p == 0.0
    assert Estimate.of([0.0, 0.0]).p == 1.0


def test_holm() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert holm({}) == {}


def test_differences_are_taken_seed_by_seed() -> None:
    """The values differ more from seed to seed than from arm to arm."""
    everything = rows("lora", [2.0, 3.0, 4.0]) + rows("x", [1.9, 2.9, 3.91]) + [base(9.0)]
    plain, other, bare = standings_of([PLAIN, arm("x"), BARE], everything, "loss")
    assert other.ahead is not None
    assert other.ahead.mean == pytest.approx(0.29 / 3)
    assert other.ahead.half_width < 0.02
    assert other.quality is not None
    assert other.quality.half_width > 2
    assert other.share == pytest.approx((9 - 8.71 / 3) / (9 - 3))
    assert plain.ahead is None
    assert plain.share == 1.0
    assert bare.share == 0.0


def test_of_accuracy_more_is_better() -> None:
    everything = (
        rows("lora", [0.74, 0.76], "accuracy")
        + rows("x", [0.84, 0.87], "accuracy")
        + [base(0.5, "accuracy")]
    )
    _, other, _ = standings_of([PLAIN, arm("x"), BARE], everything, "accuracy")
    assert other.ahead is not None
    assert other.ahead.mean == pytest.approx(0.105)
    assert other.share == pytest.approx((0.855 - 0.5) / (0.75 - 0.5))


def test_ratios_are_to_plain_lora_s_median() -> None:
    assert Ratio.of([2.0, 4.0, 3.0], [1.0, 2.0, 30.0]) == Ratio(1.5, 1.0, 2.0)
    assert Ratio.of([], [1.0]) is None
    assert Ratio.of([0.0], [1.0]) is None


def test_only_what_passes_holm_leads() -> None:
    noise = [0.001, -0.001, 0.0]
    everything = (
        rows("lora", [2.0, 2.0, 2.0])
        + rows("sure", [1.9 + n for n in noise])
        + rows("lucky", [1.99, 1.995, 1.999])
    )
    found = standings_of([PLAIN, arm("sure"), arm("lucky")], everything, "loss")
    assert [s.arm.name for s in leaders(found)] == ["sure"]
    first = verdict(found, "loss")[0]
    assert "sure by 0.100 (95 % interval 0.098 to 0.102)" in first
    assert "lucky" not in first


def test_a_verdict_of_noise_says_what_could_not_be_seen() -> None:
    everything = rows("lora", [2.0, 2.1, 2.2]) + rows("x", [2.1, 2.0, 2.15])
    first = verdict(standings_of([PLAIN, arm("x")], everything, "loss"), "loss")[0]
    assert first.startswith("**No method")
    assert re.search("3 seeds.* 0.2", first)


def test_one_seed_says_nothing_and_no_run_even_less() -> None:
    one = standings_of([PLAIN, arm("x")], rows("lora", [2.0]) + rows("x", [1.0]), "loss")
    none = standings_of([PLAIN, arm("x")], [], "loss")
    plain_alone = standings_of([PLAIN, arm("x")], rows("lora", [2.0, 2.1]), "loss")
    assert "One seed" in verdict(one, "loss")[0]
    assert len(verdict(one, "loss")) == 2  # and that one rate is no sweep
    assert "nothing to compare" in verdict(none, "loss")[0]
    assert "No other method" in verdict(plain_alone, "loss")[0]


def test_what_is_thrifty_lean_or_behind_is_said() -> None:
    plain = rows("lora", [2.0, 2.01, 2.0], trained=1000, peak_bytes=100)
    thrifty = rows("thrifty", [2.03, 2.01, 2.05], trained=10, frozen=77, peak_bytes=80)
    behind = rows("behind", [2.5, 2.51, 2.5], trained=1000, peak_bytes=100)
    found = standings_of(
        [PLAIN, arm("thrifty"), arm("behind"), BARE], plain + thrifty + behind + [base(3.0)], "loss"
    )
    said = " ".join(verdict(found, "loss"))
    assert re.search("thrifty reaches 97 % .* 1.0 % .* 77 frozen", said)
    assert re.search("thrifty reaches 97 % .* 0.80 of its memory", said)
    assert "behind (by 0.500)" in said


def test_what_is_the_same_is_said_and_what_is_only_not_told_apart_is_not() -> None:
    everything = (
        rows("lora", [2.0, 2.1, 2.05])
        + rows("near", [2.001, 2.099, 2.052])
        + rows("noisy", [2.0, 2.2, 1.95])
        + rows("worse", [2.03, 2.131, 2.079])
    )
    found = standings_of([PLAIN, *map(arm, ("near", "noisy", "worse"))], everything, "loss")
    (said,) = [sentence for sentence in verdict(found, "loss") if "The same as" in sentence]
    assert "0.020: near (" in said
    unit = [dataclasses.replace(row, report={"reward_margin": 1.0}) for row in everything]
    found = standings_of([PLAIN, arm("near")], unit, "reward_margin")
    assert not any("The same as" in sentence for sentence in verdict(found, "reward_margin"))


def test_where_there_is_nothing_to_learn_the_verdict_says_so_first() -> None:
    everything = rows("lora", [2.0, 2.1]) + rows("x", [2.0, 2.3]) + [base(2.06)]
    plain, other, bare = standings_of([PLAIN, arm("x"), BARE], everything, "loss")
    assert plain.share is other.share is None  # of nothing
    assert "untrained base" in verdict([plain, other, bare], "loss")[0]


def test_a_control_is_held_against_what_it_explains() -> None:
    control = arm("lora-alpha-x3", CONTROL, explains="delta")
    everything = (
        rows("lora", [2.0, 2.1]) + rows("delta", [1.8, 1.93]) + rows("lora-alpha-x3", [1.81, 1.92])
    )
    said = " ".join(
        verdict(standings_of([PLAIN, arm("delta"), control], everything, "loss"), "loss")
    )
    assert re.search("delta is lora-alpha-x3 .* the same .* by 0.000 ± 0.127", said)


def test_limits_and_troubles_are_told() -> None:
    whole = arm(FULL, LIMIT)
    diverged = ResultRow(Trial("x", SWEEP, 1e-2, 0), DIVERGED, "the loss became nan at step 3")
    lost = ResultRow(Trial("lost", SWEEP, 1e-3, 0), DIVERGED, "the loss became inf at step 1")
    everything = (
        rows("lora", [2.0, 2.1])
        + rows("x", [2.0, 2.2])
        + rows(FULL, [1.5, 1.61])
        + [diverged, lost]
    )
    arms = [PLAIN, arm("x"), arm("lost"), arm("no", refused="it cannot"), whole]
    said = " ".join(verdict(standings_of(arms, everything, "loss"), "loss"))
    assert "Full is ahead of tuned lora by 0.495 ± 0.064." in said
    assert re.search("Left out.*: no, .* it cannot", said)
    assert re.search("lost .*: the loss became inf at step 1", said)
    assert "x (1), lost (1)" in said


def test_a_best_rate_at_the_edge_is_marked() -> None:
    def tried(name: str, losses: dict[float, float]) -> list[ResultRow]:
        return [
            ResultRow(Trial(name, SWEEP, lr, 0), DONE, tune={"loss": x}, report={"loss": x})
            for lr, x in losses.items()
        ]

    everything = tried("lora", {1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}) + tried(
        "x", {1e-3: 2.0, 1e-2: 1.0}
    )
    plain, other = standings_of([PLAIN, arm("x")], everything, "loss")
    assert (plain.at_edge, other.at_edge) == (False, True)
    assert "edge of the sweep for x" in " ".join(verdict([plain, other], "loss"))
