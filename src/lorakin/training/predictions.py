"""What a model answered to each row, as a file and as a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from lorakin.errors import SettingError
from lorakin.storage import atomic
from lorakin.training.tasks import Evaluation

MOST_CLASSES = 20
"""The most classes of which a table of confusions is shown."""


def check(path: Path) -> None:
    """Checks that answers can be written to a new file.

    Raises:
        SettingError: the file exists, or there is no such directory.
    """
    if path.exists():
        raise SettingError(f"--predictions {path}: there is such a file; name a new one")
    if not path.parent.is_dir():
        raise SettingError(f"--predictions {path}: there is no directory {path.parent}")


def write(path: Path, found: Mapping[str | None, Evaluation]) -> None:
    """Writes one JSON object for each row: its place, the right and given answers, its mean loss.

    Of two answers it holds their texts, their rewards, and which of them won. Of several models
    each has its own line for a row, one below the other, which names its adapter; the base's is
    null.

    Args:
        path: a new JSONL file.
        found: adapter → the figures, with the answers that they come from.
    """
    by_model = [
        [{"adapter": name, **line} if len(found) > 1 else line for line in _lines(evaluation)]
        for name, evaluation in found.items()
    ]
    lines = [line for of_row in zip(*by_model, strict=True) for line in of_row]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    atomic.write(path.parent, {path.name: content.encode()})


def _lines(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Returns what is written of each row of one model."""
    answers = evaluation.answers
    assert answers is not None
    lines: list[dict[str, Any]] = []
    for n, place in enumerate(answers.where):
        line: dict[str, Any] = {"row": place}
        if answers.given:
            right, given = answers.right[n], answers.given[n]
            line |= {"right": right, "given": given}
        if answers.details:
            line |= answers.details[n]
        line["loss"] = round(float(answers.losses[n] / max(1, answers.counts[n])), 6)
        lines.append(line)
    return lines


def confusions(evaluation: Evaluation) -> Table | None:
    """Returns how often each class was answered with which; None if that is no table to look at."""
    answers = evaluation.answers
    if answers is None or evaluation.accuracy is None:
        return None
    classes = sorted({*answers.right, *answers.given})
    if not 2 <= len(classes) <= MOST_CLASSES:
        return None
    counts = Counter(zip(answers.right, answers.given, strict=True))
    table = Table("right ↓  given →", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in classes:
        table.add_column(name, justify="right")
    for right in classes:
        table.add_row(right, *(f"{counts[right, given]:,}" for given in classes))
    return table
