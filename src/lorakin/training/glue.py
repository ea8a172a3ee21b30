"""GLUE's tasks by their names: what each learns, and the metric that GLUE reports for it.

Source: Wang et al. (2018), GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language
Understanding, table 1. Where GLUE reports two metrics, the first stands here: F1 for MRPC and QQP,
Pearson's correlation for STS-B.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorakin.training.formats import CLASSIFICATION, REGRESSION

GLUE = {
    "cola": (CLASSIFICATION, "matthews"),
    "mrpc": (CLASSIFICATION, "f1"),
    "qqp": (CLASSIFICATION, "f1"),
    "stsb": (REGRESSION, "pearson"),
    "sst2": (CLASSIFICATION, "accuracy"),
    "mnli": (CLASSIFICATION, "accuracy"),
    "mnli_matched": (CLASSIFICATION, "accuracy"),
    "mnli_mismatched": (CLASSIFICATION, "accuracy"),
    "qnli": (CLASSIFICATION, "accuracy"),
    "rte": (CLASSIFICATION, "accuracy"),
    "wnli": (CLASSIFICATION, "accuracy"),
}
"""A GLUE task's name, as in the hub's `nyu-mll/glue` → what it learns, and its metric."""
HUB_SET = re.compile(r"(?:[\w.-]+/)?glue:(?P<name>\w+)(?::.*)?")


def task_and_metric(
    task: str | None, metric: str | None, data: Sequence[str]
) -> tuple[str | None, str | None]:
    """Returns the task and the metric that are meant, where the task or the data is GLUE's.

    What the user says otherwise is kept.

    >>> task_and_metric("cola", None, ["rows.jsonl"])
    ('classification', 'matthews')
    >>> task_and_metric(None, "accuracy", ["nyu-mll/glue:stsb:train"])
    ('regression', 'accuracy')
    >>> task_and_metric("classification", None, ["rows.jsonl"])
    ('classification', None)

    Args:
        task: what the user calls the task, perhaps by a name of GLUE.
        metric: the metric that the user names.
        data: files and hub data sets.
    """
    sets = [HUB_SET.fullmatch(name) for name in data]
    names = {task} if task is not None else {found["name"] if found else None for found in sets}
    if len(names) > 1 or not names & GLUE.keys():
        return task, metric
    kind, own = GLUE[str(names.pop())]
    return kind, metric or own
