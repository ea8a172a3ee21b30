"""BLEU of what the adapters of E2E NLG write, with an interval over seeds and prompts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.claims.tasks import Task
from lorakin.compare.estimates import Estimate
from lorakin.compare.next_trials import rows_at_best_rate
from lorakin.compare.report_answers import Array
from lorakin.compare.results import DONE, ResultRow, Results
from lorakin.training.evaluate import evaluate_rows
from lorakin.training.metrics import draws_of
from lorakin.training.sampling import Sampling

FILE = "written.jsonl"
LONGEST = 80
"""The most tokens of an answer."""
DRAWS = 200


@dataclasses.dataclass(frozen=True)
class WrittenRow:
    """What one adapter wrote: for each prompt the answer, and the right answers."""

    arm: str
    lr: float
    seed: int
    given: list[str]
    right: list[list[str]]


def write_missing(task: Task, out: Path, names: Sequence[str], seeds: int) -> None:
    """Lets the kept adapters of these arms write answers, unless they have.

    No trials may be running: the results file has one reader at a time.
    """
    folder, file = out / task.name, out / task.name / FILE
    known = {(row.arm, row.lr, row.seed) for row in read(file)}
    rows = Results(folder / "results.jsonl").rows
    for name in names:
        for row in rows_at_best_rate(name, rows, task.chosen_by):
            cell = (name, row.trial.lr, row.trial.seed)
            if row.status == DONE and row.trial.seed < seeds and cell not in known:
                with file.open("a", encoding="utf-8") as opened:
                    opened.write(json.dumps(dataclasses.asdict(_written(task, out, row))) + "\n")


def read(file: Path) -> list[WrittenRow]:
    """Returns what was written so far."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [WrittenRow(**json.loads(line)) for line in lines]


def _written(task: Task, out: Path, row: ResultRow) -> WrittenRow:
    adapter = out / task.name / "trials" / row.trial.name
    report = str(out / task.name / "data" / "report.jsonl")
    found = evaluate_rows(
        task.model,
        str(adapter),
        report,
        max_length=task.recipe["max_length"],
        batch_size=task.recipe["batch_size"],
        sampling=Sampling(LONGEST),
    )
    answers = found.answers
    assert answers is not None
    given: dict[int, str] = {}
    right: dict[int, list[str]] = {}
    for number, said, asked in zip(answers.groups, answers.given, answers.right, strict=True):
        given[number] = said
        right.setdefault(number, []).append(asked)
    assert row.trial.lr is not None
    return WrittenRow(
        row.trial.arm, row.trial.lr, row.trial.seed, list(given.values()), list(right.values())
    )


def bleu_of(row: WrittenRow, prompts: Sequence[int]) -> float:
    """Returns sacrebleu's corpus BLEU, 0 to 100, of these prompts, which may repeat."""
    return _bleu(counts_of(row)[list(prompts)].sum(axis=0))


def counts_of(row: WrittenRow) -> Array:
    """Returns what BLEU counts in each answer, (prompts, 10); a corpus has their sums.

    They are the n-grams that are right and all n-grams, for n from 1 to 4, and the two lengths.
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(effective_order=True)  # of single sentences sacrebleu warns without it
    found = [
        metric.sentence_score(said, asked) for said, asked in zip(row.given, row.right, strict=True)
    ]
    return np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found])


def _bleu(sums: Array) -> float:
    from sacrebleu.metrics import BLEU

    right, all_, (said, asked) = (part.tolist() for part in (sums[:4], sums[4:8], sums[8:]))
    return float(BLEU.compute_bleu(right, all_, said, asked, smooth_method="exp").score)


def difference(rows: Sequence[WrittenRow], others: Sequence[WrittenRow]) -> Estimate | None:
    """Returns how much higher the BLEU of an arm is, by seed and on the same draws of prompts."""
    first, second = ({row.seed: counts_of(row) for row in found} for found in (rows, others))
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    count = len(rows[0].given)

    def gaps(weights: Array) -> list[float]:
        return [_bleu(weights @ first[n]) - _bleu(weights @ second[n]) for n in seeds]

    drawn = [gaps(weights) for weights in draws_of(count, DRAWS)]
    return Estimate.of(gaps(np.ones(count, int)), np.array(drawn).T, count)
