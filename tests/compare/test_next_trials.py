"""What runs next follows from the rows alone, so that a killed comparison goes on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from lorakin.compare import next_trials
from lorakin.compare.arms import MEMBER, Arm
from lorakin.compare.next_trials import (
    DIVERGED_SCORE,
    Sweep,
    expected,
    rate,
    remaining,
    rows_at_best_rate,
    sweep_scores,
)
from lorakin.compare.prepared_comparison import check_anything_ran
from lorakin.compare.results import (
    DIVERGED,
    DONE,
    FAILED,
    REFUSED,
    SEED,
    SWEEP,
    TIMING,
    ResultRow,
    Trial,
)
from lorakin.errors import SettingError

ARM = Arm("a", "a", MEMBER, "lora", 8, 2.0, lr=1e-3)
SEEDS = [0, 1, 2]


def ended(trial: Trial, loss: Callable[[float], float]) -> ResultRow:
    value = loss(trial.lr or 0.0)
    if not math.isfinite(value):
        return ResultRow(trial, DIVERGED, "the loss became nan")
    return ResultRow(trial, DONE, tune={"loss": value}, report={"loss": value}, seconds=1.0)


def run(
    loss: Callable[[float], float],
    rows: list[ResultRow] | None = None,
    sweep: Sweep | None = None,
    most: int = 99,
) -> list[ResultRow]:
    rows = list(rows or [])
    while (
        todo := remaining(ARM, rows, SEEDS, sweep or Sweep(), timed=False, measure="loss")
    ) and len(rows) < most:
        rows.append(ended(todo[0], loss))
    return rows


def valley(best: float) -> Callable[[float], float]:
    return lambda lr: 1 + math.log10(lr / best) ** 2


@pytest.mark.parametrize("place", [-3, -1, 0, 1, 2, 3, 5])
def test_the_sweep_finds_the_bottom_wherever_it_lies(place: int) -> None:
    rows = run(valley(rate(1e-3, place)))
    assert {row.trial.lr for row in rows_at_best_rate("a", rows, "loss")} == {rate(1e-3, place)}
    assert sorted(row.trial.seed for row in rows_at_best_rate("a", rows, "loss")) == SEEDS
    known = sorted(sweep_scores("a", rows, "loss"))
    if place > -3:  # further down than the sweep may go
        assert known[0] < rate(1e-3, place) < known[-1]
    assert len(known) <= next_trials.MOST_RATES


def test_all_rates_at_once_then_the_seeds() -> None:
    first = remaining(ARM, [], SEEDS, Sweep(), timed=False, measure="loss")
    assert [(t.stage, t.lr, t.seed) for t in first] == [
        (SWEEP, 1e-3, 0),
        (SWEEP, 3.2e-3, 0),
        (SWEEP, 1e-2, 0),
    ]
    rows = [ended(trial, valley(3.2e-3)) for trial in first]
    assert [
        (t.stage, t.lr, t.seed)
        for t in remaining(ARM, rows, SEEDS, Sweep(), timed=False, measure="loss")
    ] == [
        (SEED, 3.2e-3, 1),
        (SEED, 3.2e-3, 2),
    ]


@pytest.mark.parametrize("killed", range(8))
def test_a_killed_comparison_ends_as_an_unbroken_one(killed: int) -> None:
    whole = run(valley(2e-2))
    assert run(valley(2e-2), run(valley(2e-2), most=killed)) == whole


def test_what_diverges_counts_against_its_rate() -> None:
    rows = run(lambda lr: math.nan if lr > 2e-3 else valley(1e-3)(lr))
    assert sweep_scores("a", rows, "loss")[3.2e-3] == DIVERGED_SCORE
    assert {row.trial.lr for row in rows_at_best_rate("a", rows, "loss")} == {1e-3}


def test_if_all_diverge_smaller_rates_are_tried_and_then_no_more() -> None:
    rows = run(lambda lr: math.nan)
    assert len(rows) == next_trials.MOST_RATES
    assert min(sweep_scores("a", rows, "loss")) == rate(1e-3, -4)
    assert rows_at_best_rate("a", rows, "loss") == []


def test_a_refused_arm_is_not_run_again_a_failed_trial_costs_its_rate() -> None:
    trial = Trial("a", SWEEP, 1e-3, 0)
    assert (
        remaining(
            ARM, [ResultRow(trial, REFUSED, "no")], SEEDS, Sweep(), timed=False, measure="loss"
        )
        == []
    )
    assert (
        remaining(
            dataclasses.replace(ARM, refused="no"), [], SEEDS, Sweep(), timed=False, measure="loss"
        )
        == []
    )
    failed = [ResultRow(trial, FAILED, "killed")]
    assert sweep_scores("a", failed, "loss") == {1e-3: DIVERGED_SCORE}


def test_the_measure_that_decides_chooses_the_rate_and_the_loss_breaks_ties() -> None:
    """Rates 1, 2 and 3: the loss is lowest at 1, the accuracy highest at 2 and 3."""
    figures = {
        1.0: {"loss": 0.1, "accuracy": 0.6, "mean_absolute_error": 3.0},
        2.0: {"loss": 0.3, "accuracy": 0.8, "mean_absolute_error": 2.0},
        3.0: {"loss": 0.2, "accuracy": 0.8, "mean_absolute_error": 1.0},
        4.0: {"loss": math.nan, "accuracy": 0.9, "mean_absolute_error": 0.0},
    }
    rows = [ResultRow(Trial("a", SWEEP, lr, 0), DONE, tune=tune) for lr, tune in figures.items()]
    best = {
        measure: next_trials.best_rate(sweep_scores("a", rows, measure))
        for measure in ("loss", "accuracy", "mean_absolute_error")
    }
    assert best == {"loss": 1.0, "accuracy": 3.0, "mean_absolute_error": 3.0}
    assert next_trials.sweep_figures("a", rows, "accuracy") == {
        1.0: 0.6, 2.0: 0.8, 3.0: 0.8, 4.0: math.inf,
    }  # fmt: skip
    given = Sweep((1.0, 2.0, 3.0, 4.0))
    waiting = remaining(ARM, rows, SEEDS, given, timed=False, measure="accuracy")
    assert [(t.stage, t.lr, t.seed) for t in waiting] == [(SEED, 3.0, 1), (SEED, 3.0, 2)]


def test_given_rates_are_all_that_is_tried() -> None:
    rows = run(valley(1.0), sweep=Sweep((1e-4, 1e-3)))
    assert sorted(sweep_scores("a", rows, "loss")) == [1e-4, 1e-3]
    assert len(rows) == 2 + 2


def test_what_does_not_train_runs_once_and_what_is_timed_is_timed_first() -> None:
    still = dataclasses.replace(ARM, lr=None)
    (trial,) = remaining(still, [], SEEDS, Sweep(), timed=False, measure="loss")
    assert trial.lr is None
    assert (
        remaining(still, [ResultRow(trial, DONE)], SEEDS, Sweep(), timed=False, measure="loss")
        == []
    )
    (first,) = remaining(ARM, [], SEEDS, Sweep(), timed=True, measure="loss")
    assert first.stage == TIMING
    assert (
        len(remaining(ARM, [ResultRow(first, DONE)], SEEDS, Sweep(), timed=True, measure="loss"))
        == 3
    )


def test_expected_counts_down_to_nothing() -> None:
    rows: list[ResultRow] = []
    assert expected(ARM, rows, SEEDS, Sweep(), timed=False, measure="loss") == 5
    assert expected(ARM, rows, SEEDS, Sweep(), timed=True, measure="loss") == 6
    while todo := remaining(ARM, rows, SEEDS, Sweep(), timed=False, measure="loss"):
        rows.append(ended(todo[0], valley(3.2e-3)))
        assert expected(ARM, rows, SEEDS, Sweep(), timed=False, measure="loss") == 5 - len(rows)


def test_a_comparison_of_which_every_trial_failed_says_why() -> None:
    def check(*rows: ResultRow) -> None:
        check_anything_ran(
            SimpleNamespace(
                arms=[ARM, dataclasses.replace(ARM, name="b", title="b")],
                results=SimpleNamespace(rows=rows),
            )
        )  # type: ignore[arg-type]

    failed = [
        ResultRow(Trial(arm, SWEEP, lr, 0), FAILED, f"{arm} is out of memory")
        for arm in "ab"
        for lr in (1e-3, 3e-3)
    ]
    with pytest.raises(SettingError, match="a is out of memory"):
        check(*failed)
    with pytest.raises(SettingError, match="no such thing"):
        check(ResultRow(Trial("a", SWEEP, 1e-3, 0), REFUSED, "no such thing"), *failed[2:])
    check(*failed[:2])  # b is still to run
    check(*failed, ResultRow(Trial("b", SWEEP, 1e-2, 0), DONE))
    check(*failed[:2], ResultRow(Trial("b", SWEEP, 1e-3, 0), DIVERGED))
