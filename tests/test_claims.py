"""The study of the claims: its statistics against simulation, and its committed rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import sacrebleu
from benchmarks.claims import again, archive, arms, bleu, evidence, page
from benchmarks.claims.analysis import UNKNOWN, Difference, Evidence, Judged, over_tasks
from benchmarks.claims.design import design
from benchmarks.claims.judges import (
    MISSING,
    OPEN,
    REFUTED,
    SHOWN,
    correlations,
    ranks_moved,
    sooner,
)
from benchmarks.claims.statements import STATEMENTS
from benchmarks.claims.tasks import TASKS, without_overlap

from lorakin.compare.arms import REFERENCE, Arm
from lorakin.compare.prior import BETTER, SAME, WORSE, prior
from lorakin.compare.report_answers import ReportAnswers
from lorakin.compare.results import DONE, ResultRow, Trial
from lorakin.compare.standings import Standing, standings_of
from lorakin.family import method_named
from lorakin.plan.meta_model import meta_model_of, trainable_parameters


def difference(mean: float, half: float, margin: float = 1.0) -> Difference:
    return Difference(mean, half, margin, p=0.5, seeds=5, rows=100)


@pytest.mark.parametrize(
    ("mean", "half", "verdict", "no_worse"),
    [
        (0.2, 0.5, SAME, True),
        (0.9, 0.5, BETTER, True),
        (2.0, 0.5, BETTER, True),
        (-2.0, 0.5, WORSE, False),
        (0.0, 1.5, UNKNOWN, False),
        (0.8, 1.5, UNKNOWN, True),
        (-0.9, 0.5, WORSE, False),
    ],
)
def test_what_an_interval_shows(mean: float, half: float, verdict: str, no_worse: bool) -> None:
    found = difference(mean, half)
    assert (found.verdict, found.is_no_worse) == (verdict, no_worse)


@pytest.mark.parametrize(
    ("mean", "half", "p", "verdict"),
    [
        (-2.0, 1.5, 0.04, WORSE),
        (-2.0, 1.5, 0.06, UNKNOWN),
        (0.2, 0.5, 1.0, SAME),
        (2.0, 1.5, 0.06, UNKNOWN),
    ],
)
def test_one_of_several_methods_differs_only_after_correction(
    mean: float, half: float, p: float, verdict: str
) -> None:
    assert Judged(difference(mean, half), p).verdict == verdict


def test_the_mean_over_tasks_is_as_sure_as_a_simulation_says() -> None:
    generator = np.random.default_rng(0)
    halves = np.array([1.0, 2.0, 0.5])
    means = generator.normal(0.3, halves / 1.96, (20_000, 3)).mean(axis=1)
    found = over_tasks([difference(0.3, half) for half in halves])
    assert found.mean == pytest.approx(0.3)
    assert found.half == pytest.approx(1.96 * means.std(), rel=0.02)
    assert found.p == pytest.approx(2 * (means < 0).mean(), abs=0.02)


def test_phrases_of_the_report_are_not_trained_on() -> None:
    report = [{"sentence": "A charming and often affecting journey ."}]
    train = [
        {"sentence": text}
        for text in ("often affecting", "charming", "a dull journey", "journey often", "he said : a charming and often affecting journey . twice")
    ]  # fmt: skip
    kept = [row["sentence"] for row in without_overlap(train, report)]
    assert kept == ["a dull journey", "journey often"]


def test_one_more_value_lands_where_it_is_expected() -> None:
    """Of many studies of five seeds, 95 % hold a sixth run."""
    values = np.random.default_rng(0).normal(0.8, 0.01, (2000, 6))
    inside = [
        low <= sixth <= high for *five, sixth in values for low, high in [again.expected(five)]
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_bleu_is_sacrebleu_s_and_a_difference_of_nothing_is_none() -> None:
    right = [["the cat sat on the mat", "a cat sat there"], ["dogs run in the park today"]]
    good = bleu.WrittenRow(
        "good", 1e-3, 0, ["the cat sat on the mat", "dogs run in the park"], right
    )
    bad = bleu.WrittenRow("bad", 1e-3, 0, ["a dog", "the park runs in dogs"], right)
    references = [[right[0][0], right[1][0]], [right[0][1], None]]
    expected = sacrebleu.corpus_bleu(good.given, references).score  # type: ignore[arg-type]
    assert bleu.bleu_of(good, range(2)) == pytest.approx(expected)
    assert bleu.bleu_of(good, [0, 0]) == pytest.approx(100)
    found = bleu.difference([good], [bad])
    assert found is not None and found.mean > 50 and math.isinf(found.half_width)
    same = bleu.difference([good], [dataclasses.replace(good, arm="same")])
    assert same is not None and same.mean == 0 == same.half_of_rows
    assert bleu.difference([good], [dataclasses.replace(bad, seed=1)]) is None


def test_times_and_memory_of_two_machines_are_those_of_the_first() -> None:
    """The second is twice as fast and takes half the memory; a third did not run LoRA."""

    def row(arm: str, work: float) -> ResultRow:
        return ResultRow(
            Trial(arm, "seed", 1e-3, 0), DONE, step_work=work, peak_bytes=int(100 * work)
        )

    rows = [row("lora", 2.0), row("dora", 3.0), row("lora", 1.0), row("dora", 1.5), row("dora", 7)]
    places = [{"trials": 2}, {"trials": 2}, {"trials": 1}]
    found = archive.on_the_first_machine(archive.Archive({"places": places}, rows), "lora")
    assert [one.step_work for one in found] == [2.0, 3.0, 2.0, 3.0, 0.0]
    assert [one.peak_bytes for one in found] == [200, 300, 200, 300, 0]


def trained(name: str, seed: int, **more: Any) -> ResultRow:
    return ResultRow(Trial(name, "seed", 1e-3, seed), DONE, **more)


def stands(name: str, rows: list[ResultRow]) -> Standing:
    arm = Arm(name, name, REFERENCE, words=name, rank=8, scaling=1, lr=1e-3)
    return dataclasses.replace(standings_of([arm], rows, "loss")[0], rows=rows)


@pytest.mark.parametrize(
    ("steps", "said", "verdict"),
    [
        ((10, 20, 25), "2.00× (1.60× to 4.00×)", SHOWN),
        ((20, 30, None), "1.33× (never to 2.00×)", OPEN),
        ((32, None, None), "never (never to 1.25×)", REFUTED),
    ],
)
def test_how_much_sooner_counts_the_seeds_that_never_get_there(
    steps: tuple[int | None, ...], said: str, verdict: str
) -> None:
    """LoRA needs 40 steps for its loss of 1; of the other arm each seed has its own number."""
    plain = [trained("lora", n, curve=[(20, 2.0), (40, 1.0)]) for n in range(3)]
    other = [
        trained("dora", n, curve=[(step, 1.0)] if step else [(40, 1.1)])
        for n, step in enumerate(steps)
    ]
    found = Evidence(TASKS[0], {"lora": stands("lora", plain), "dora": stands("dora", other)})
    assert sooner("dora", 1.5)([found]) == (f"{TASKS[0].title} {said}", verdict)


def test_a_difference_on_glue_s_own_rows() -> None:
    """On the two rows that are GLUE's, the other arm is right once more."""
    task = dataclasses.replace(TASKS[0], added=2)
    right = [1.0, 0.0, 1.0, 0.0]

    def runs(name: str, given: list[float]) -> list[ResultRow]:
        answers = ReportAnswers([1.0] * 4, [], right, given)
        return [trained(name, n, answers=answers, report={"accuracy": 0.5}) for n in range(2)]

    plain, other = runs("lora", [1, 0, 0, 0]), runs("dora", [0, 1, 1, 0])
    found = Evidence(task, {"lora": stands("lora", plain), "dora": stands("dora", other)})
    whole, own = found.difference("dora"), found.on_own_rows("dora")
    assert whole is not None and (whole.mean, whole.rows) == (0, 4)
    assert own is not None and (own.mean, own.rows) == (50, 2)


def test_the_pilot_s_parts_are_those_that_it_was_drawn_with() -> None:
    """Errors of seeds, of rows and of both are found again; half widths follow by hand."""
    chance, task = np.random.default_rng(0), next(t for t in TASKS if t.measure == "loss")
    alike, seeds, rows = chance.normal(0, 2.0, 1000), 30, 1000

    def runs(name: str, of_rows: Any, of_seeds: float, of_both: float) -> list[ResultRow]:
        tables = [
            of_rows + chance.normal(0, of_seeds) + chance.normal(0, of_both, rows)
            for _ in range(seeds)
        ]
        return [
            trained(name, n, answers=ReportAnswers([float(x) for x in table]), report={"loss": float(table.mean())})
            for n, table in enumerate(tables)
        ]  # fmt: skip

    standings = {
        "lora": stands("lora", runs("lora", 0 * alike, 0, 0)),
        "dora": stands("dora", runs("dora", alike, 0.3, 4.0)),
    }
    found = design(Evidence(task, standings), 5)
    assert found is not None and found.of_rows == pytest.approx(2, rel=0.15)
    assert found.of_both == pytest.approx(4, rel=0.05)
    assert found.of_seeds == pytest.approx(math.sqrt(0.3**2 + 4**2 / rows), rel=0.3)
    by_hand = math.hypot(
        2.776 * found.of_seeds / math.sqrt(5), 1.962 * found.of_rows / math.sqrt(rows)
    )
    assert found.half == pytest.approx(by_hand, rel=0.001)


def test_ranks_and_directions_are_judged() -> None:
    """AdaLoRA gave FFN layers more rank and upper layers less; only LoRA's changes go together."""
    paths = [f"layer.{n}.{part}" for n in range(4) for part in ("attention.query", "ffn.dense")]
    ranks = [8, 12, 6, 10, 4, 8, 2, 6]
    moved = [(1, dict.fromkeys(paths, 8)), (9, dict(zip(paths, ranks, strict=True)))]

    def standing(name: str, moves: list[tuple[float, float]], **more: Any) -> Standing:
        found = [(1, {f"q{n}": move for n, move in enumerate(moves)})]
        return stands(name, [trained(name, seed, moves=found, **more) for seed in range(2)])

    together, apart = [(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)], [(0.1, 0.3), (0.2, 0.2), (0.3, 0.1)]
    standings = {
        "lora": standing("lora", together),
        "full": standing("full", apart),
        "dora": standing("dora", together),
        "adalora": standing("adalora", together, ranks=moved),
    }
    (found,) = [Evidence(TASKS[0], standings)]
    assert ranks_moved([found])[1] == "on 1 of 2"
    said, verdict = correlations("q", lambda full, plain, split: full < 0 < plain)([found])
    assert verdict == SHOWN and "−1.00 / +1.00 / +1.00" in said
    assert correlations("q", lambda full, plain, split: split < 0)([found])[1] == REFUTED
    assert correlations("k", lambda *_: True)([found])[1] == MISSING


def test_the_committed_rows_make_the_committed_page() -> None:
    """What stands on the page follows from the rows."""
    text = (archive.ROOT / "docs" / "evidence" / "study.md").read_text(encoding="utf-8")
    kept = evidence.all_archived()
    assert kept, "no task's rows are committed"
    made = "\n".join(page.made([e for e, _ in kept], [how for _, how in kept]))
    assert made in text
    assert page.prior_of(page.finished([e for e, _ in kept])) == prior()
    for found, how in kept:
        trials = archive.load(found.task.name).rows
        rows = [row for row in trials if row.status == DONE]
        assert len(rows) > how["seeds"] and found.standings["lora"].quality is not None


def test_a_claim_without_runs_is_not_judged() -> None:
    assert {one.measured([])[1] for one in STATEMENTS} == {MISSING}


@pytest.mark.model
@pytest.mark.parametrize(
    ("model", "few", "vera"), [("minilm", 30_720, 30_592), ("smollm2", 207_360, 209_280)]
)
def test_lora_as_small_as_vera(model: str, few: int, vera: int) -> None:
    """LoRA of rank 1 on some modules trains as many parameters as VeRA of rank 256 on all."""
    labels = ["0", "1"] if model == "minilm" else None
    found = meta_model_of(model, "float32", labels)
    counts = [
        trainable_parameters(
            found, method_named("lora", {"rank": 1}), targets=arms.FEW_TARGETS[model]
        ),
        trainable_parameters(found, method_named("vera", {"rank": 256}), targets="all-linear"),
    ]
    assert counts == [few, vera]


def test_every_member_has_a_claim() -> None:
    named = {one.member for one in STATEMENTS}
    assert named == {*arms.MEMBERS, *arms.STARTS}
    assert len({task.name for task in TASKS}) == len(TASKS)
