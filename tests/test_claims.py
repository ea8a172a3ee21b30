"""The study of the claims: its statistics against simulation, and a small study from end to end."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from benchmarks.claims import again, archive, arms, bleu, evidence, page, study
from benchmarks.claims.analysis import UNKNOWN, Difference, Evidence, Judged, over_tasks
from benchmarks.claims.design import design
from benchmarks.claims.statements import (
    MISSING,
    REFUTED,
    SHOWN,
    STATEMENTS,
    correlations,
    ranks_moved,
)
from benchmarks.claims.tasks import TASKS, Task, without_overlap
from rich.console import Console

from lorakin.compare.arms import REFERENCE, Arm
from lorakin.compare.prior import BETTER, SAME, WORSE, prior
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
    good = bleu.WrittenRow("good", 0, ["the cat sat on the mat", "dogs run in the park"], right)
    bad = bleu.WrittenRow("bad", 0, ["a dog", "the park runs in dogs"], right)
    references = [[right[0][0], right[1][0]], [right[0][1], None]]
    expected = sacrebleu.corpus_bleu(good.given, references).score  # type: ignore[arg-type]
    assert bleu.bleu_of(good, range(2)) == pytest.approx(expected)
    assert bleu.bleu_of(good, [0, 0]) == pytest.approx(100)
    found = bleu.difference([good], [bad])
    assert found is not None and found.mean > 50 and math.isinf(found.half_width)
    same = bleu.difference([good], [dataclasses.replace(good, arm="same")])
    assert same is not None and same.mean == 0 == same.half_of_rows
    assert bleu.difference([good], [dataclasses.replace(bad, seed=1)]) is None


@pytest.fixture(scope="module")
def small(bert_dir: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Path]:
    """A study of LoRA and DoRA on a tiny BERT, four steps a trial."""
    words = ("cat", "dog", "bird", "tree")
    rows = [
        {"sentence": f"the {word} sat {n}", "label": int(word in ("cat", "bird"))}
        for n in range(120)
        for word in words
    ]

    def parts(data: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return rows[:400], rows[400:]

    recipe = {"batch_size": 4, "max_length": 16}
    task = Task("small", "Small", bert_dir, "f1", 4, recipe, parts, chosen_by="accuracy")
    out = tmp_path_factory.mktemp("study")
    study.run_task(task, "", out, arms.PILOT, 2, "cpu", Console(quiet=True))
    return task, out


def test_a_study_from_its_trials_to_its_page(
    small: tuple[Task, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, out = small
    kept = evidence.archived(task, "", out, "2026-11-30")
    monkeypatch.setattr(archive, "FOLDER", tmp_path)
    archive.save(task.name, kept)
    found = evidence.evidence_of(task, archive.load(task.name))
    assert found.standings.keys() == {"lora", "dora", "constant"}
    for name, standing in found.standings.items():
        assert name == "constant" or (len(standing.done) == 2 and standing.trained)
    rows = found.standings["dora"].done
    assert [step for step, _ in rows[0].curve] == [1, 2, 3, 4]
    gap = found.difference("dora")
    by_hand = [(row.report or {})["f1"] for row in rows]
    plain = [(row.report or {})["f1"] for row in found.standings["lora"].done]
    assert gap is not None and gap.rows == 80
    assert gap.mean == pytest.approx(100 * (np.mean(by_hand) - np.mean(plain)))

    planned = design(found, study.SEEDS)
    assert planned is not None and planned.rows == 80
    monkeypatch.setattr(page, "METHODS", ("lora", "dora"))
    monkeypatch.setattr(page, "PRIOR", tmp_path / "prior.json")
    written = tmp_path / "claims.md"
    written.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write(written, [(found, kept.how)])
    text = written.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "### Small" in text and text.count("| dora |") >= 1
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_runs_again_to_the_same_figure(
    small: tuple[Task, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, out = small
    monkeypatch.setattr(archive, "FOLDER", tmp_path)
    archive.save(task.name, evidence.archived(task, "", out, "2026-11-30"))
    cell = again.run_again(task, "lora", 1, "")
    assert cell.before is not None and cell.value == pytest.approx(cell.before, abs=1e-12)
    assert cell.lands
    assert not dataclasses.replace(cell, value=cell.high + 1).lands
    with pytest.raises(SystemExit):
        again.run_again(task, "vera", 1, "")


def test_a_study_goes_on_elsewhere_from_the_committed_rows(
    small: tuple[Task, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, out = small
    monkeypatch.setattr(archive, "FOLDER", tmp_path / "kept")
    quiet = Console(quiet=True)
    archive.replace(task.name, evidence.archived(task, "", out, "2026-11-30"))
    elsewhere = tmp_path / "elsewhere"
    study.restore(task, "", elsewhere, quiet)
    study.restore(task, "", elsewhere, quiet)
    run = study.run_task(task, "", elsewhere, arms.PILOT, 3, "cpu", quiet)
    kept = archive.load(task.name).rows
    assert [row.trial for row in run.results.rows[: len(kept)]] == [row.trial for row in kept]
    assert {row.trial.seed for row in run.results.rows[len(kept) :]} == {2}

    archive.replace(task.name, evidence.archived(task, "", elsewhere, "2026-12-02"))
    both = archive.load(task.name)
    assert len(both.rows) == len(kept) + 2
    assert [(place["days"], place["trials"]) for place in both.how["places"]] == [
        (["2026-11-30"], len(kept)),
        (["2026-12-02"], 2),
    ]
    with pytest.raises(SystemExit):  # the first directory lacks the third seed
        archive.replace(task.name, evidence.archived(task, "", out, "2026-12-03"))
    train, report = task.parts("")
    other = dataclasses.replace(task, parts=lambda data: (train[:300], report))
    with pytest.raises(SystemExit):
        study.restore(other, "", tmp_path / "other", quiet)


def test_times_of_two_machines_are_those_of_the_first() -> None:
    """The second machine is twice as fast, as LoRA shows; a third did not run LoRA."""

    def row(arm: str, work: float) -> ResultRow:
        return ResultRow(Trial(arm, "seed", 1e-3, 0), DONE, step_work=work)

    rows = [row("lora", 2.0), row("dora", 3.0), row("lora", 1.0), row("dora", 1.5), row("dora", 7)]
    places = [{"trials": 2}, {"trials": 2}, {"trials": 1}]
    found = archive.on_the_first_machine(archive.Archive({"places": places}, rows), "lora")
    assert [one.step_work for one in found] == [2.0, 3.0, 2.0, 3.0, 0.0]


def test_ranks_and_directions_are_judged() -> None:
    """AdaLoRA gave FFN layers more rank and upper layers less; only LoRA's changes go together."""
    paths = [f"layer.{n}.{part}" for n in range(4) for part in ("attention.query", "ffn.dense")]
    ranks = [8, 12, 6, 10, 4, 8, 2, 6]
    moved = [(1, dict.fromkeys(paths, 8)), (9, dict(zip(paths, ranks, strict=True)))]

    def standing(name: str, moves: list[tuple[float, float]], **more: Any) -> Standing:
        rows = [
            ResultRow(
                Trial(name, "seed", 1e-3, seed), DONE, moves=[(1, {f"q{n}": move for n, move in enumerate(moves)})], **more
            )
            for seed in range(2)
        ]  # fmt: skip
        arm = Arm(name, name, REFERENCE, words=name, rank=8, scaling=1, lr=1e-3)
        return dataclasses.replace(standings_of([arm], rows, "loss")[0], rows=rows)

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
    assert page.prior_of([e for e, _ in kept]) == prior()
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
