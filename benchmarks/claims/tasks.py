"""The tasks of the study: GLUE's CoLA, MRPC, RTE and SST-2, E2E NLG, docstrings, movie reviews."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakin.compare.figures import margin_of
from lorakin.training.docstrings import docstring_rows

Rows = list[dict[str, Any]]
HUB = "hub"
GLUE_ON_HUB, E2E_ON_HUB = "nyu-mll/glue", "e2e_nlg"
MEANINGS = 40
"""Meanings of E2E's held-out rows that are reported on, with all their references."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One model on one data set.

    Attributes:
        name: the name in files.
        title: the name that people see.
        model: the packaged model.
        measure: what is reported, and what the claims are judged by.
        chosen_by: what learning rates are chosen by, on the tuning rows.
        steps: the optimizer steps of a trial.
        recipe: fields of the recipe that all trials share.
        parts: returns the rows to train on and the rows to report on, from the folder with the
            data.
        added: how many of the rows to report on, the first ones, were training rows of GLUE.
    """

    name: str
    title: str
    model: str
    measure: str
    steps: int
    recipe: dict[str, Any]
    parts: Callable[[str], tuple[Rows, Rows]]
    chosen_by: str = ""
    added: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "chosen_by", self.chosen_by or self.measure)

    @property
    def target(self) -> float:
        """The half width of a paired 95 % interval that the study aims at, in the measure."""
        margin = margin_of(self.measure)
        assert margin is not None, self.measure
        return margin


def glue(name: str, more: int) -> Callable[[str], tuple[Rows, Rows]]:
    """Returns the function that splits a GLUE task.

    The rows to report on are GLUE's held-out ones and `more` of its training rows, drawn at random
    but always the same: with the held-out ones alone, no number of runs would show a point.
    """

    def parts(data: str) -> tuple[Rows, Rows]:
        train, held_out = rows_of(data, name)
        random.Random(0).shuffle(train)
        return without_overlap(train[more:], train[:more] + held_out), train[:more] + held_out

    return parts


def without_overlap(train: Rows, report: Rows) -> Rows:
    """Returns the training rows whose texts are no part of a report row's, and hold none of them.

    SST-2's training rows are phrases of its sentences, so one can stand in another.
    """
    texts = {" ".join(str(value).lower().split()) for row in report for value in texts_in(row)}
    words = {tuple(text.split()) for text in texts}
    lengths = sorted({len(text) for text in words})
    inside = {
        tuple(text[start : start + length])
        for text in words
        for length in range(1, len(text) + 1)
        for start in range(len(text) - length + 1)
    }

    def overlaps(row: dict[str, Any]) -> bool:
        own = [tuple(str(value).lower().split()) for value in texts_in(row)]
        return all(
            text in inside
            or any(
                text[start : start + length] in words
                for length in lengths
                for start in range(len(text) - length + 1)
            )
            for text in own
        )

    return [row for row in train if not overlaps(row)]


def texts_in(row: dict[str, Any]) -> list[str]:
    """Returns the texts of a row of GLUE."""
    return [value for name, value in row.items() if name.startswith("sentence")]


def e2e(data: str) -> tuple[Rows, Rows]:
    """Returns E2E's training rows, and those of the first meanings that are held out."""
    train, held_out = rows_of(data, "e2e")
    prompts = list(dict.fromkeys(row["prompt"] for row in held_out))[:MEANINGS]
    return train, [row for row in held_out if row["prompt"] in prompts]


def docstrings(data: str) -> tuple[Rows, Rows]:
    """Returns short functions of the standard library with their docstrings."""
    rows: Rows = list(docstring_rows(max_code=200))
    return rows[400:], rows[:400]


def reviews(data: str) -> tuple[Rows, Rows]:
    """Returns movie reviews with their ratings as two classes."""
    from examples.movie_sentiment import snippets

    rows: Rows = list(snippets())
    return rows[4000:], rows[:4000]


def rows_of(data: str, name: str) -> tuple[Rows, Rows]:
    """Returns the training and the held-out rows of a task, from a folder or from the hub."""
    if data != HUB:
        return tuple(  # type: ignore[return-value]
            [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            for file in (Path(data) / f"{name}_{part}.jsonl" for part in ("train", "heldout"))
        )
    from datasets import load_dataset

    if name != "e2e":
        found = load_dataset(GLUE_ON_HUB, name)
        columns = [c for c in found["train"].column_names if c != "idx"]
        return tuple(list(found[part].select_columns(columns)) for part in ("train", "validation"))  # type: ignore[return-value]
    found = load_dataset(E2E_ON_HUB)
    return tuple(  # type: ignore[return-value]
        [
            {"prompt": row["meaning_representation"], "completion": row["human_reference"]}
            for row in found[part]
        ]
        for part in ("train", "validation")
    )


def classifier(steps: int, **recipe: Any) -> dict[str, Any]:
    """Returns what the tasks with classes share."""
    return {
        "model": "minilm",
        "steps": steps,
        "recipe": {"batch_size": 16, "max_length": 128, "group_by_length": True} | recipe,
    }


def of_glue(
    name: str,
    title: str,
    added: int,
    steps: int,
    measure: str = "accuracy",
    chosen_by: str = "",
    batch_size: int = 16,
) -> Task:
    """Returns a task of GLUE."""
    return Task(
        name, title, measure=measure, chosen_by=chosen_by, parts=glue(name, added), added=added,
        **classifier(steps, batch_size=batch_size),
    )  # fmt: skip


TASKS: Sequence[Task] = (
    of_glue("sst2", "SST-2", added=2500, steps=400),
    Task("e2e", "E2E NLG", "smollm2", "loss", 60,
        {"batch_size": 8, "max_length": 128, "group_by_length": True}, e2e),
    # F1 of a constant answer is 0.80 there, more than that of a model that has learned a little.
    # A third of these steps taught LoRA little more than that answer (docs/log.md).
    of_glue("mrpc", "MRPC", added=800, steps=320, measure="f1", chosen_by="accuracy", batch_size=32),
    of_glue("rte", "RTE", added=500, steps=160, batch_size=32),
    of_glue("cola", "CoLA", added=2000, steps=750, measure="matthews", batch_size=32),
    Task("docstrings", "docstrings", "smollm2", "loss", 60,
        {"batch_size": 4, "max_length": 128, "chat_template": False, "group_by_length": True},
        docstrings),
    Task("reviews", "movie reviews", measure="accuracy", parts=reviews,
        **classifier(300, max_length=64)),
)  # fmt: skip


def task_named(name: str) -> Task:
    """Returns the task of that name."""
    return next(task for task in TASKS if task.name == name)
