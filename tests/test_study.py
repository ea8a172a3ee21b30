"""A small study of the claims, from end to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.claims import again, archive, arms, evidence, page, study
from benchmarks.claims.design import design
from benchmarks.claims.tasks import Task
from rich.console import Console


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
