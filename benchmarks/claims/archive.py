"""The study's rows as they are committed: every trial, with what the page is made from.

One file for each task, docs/evidence/claims/TASK.jsonl.xz: a line of JSON for each trial, as in the
results.jsonl of `lorakin compare`. To keep it at a few megabytes, answers to single rows are kept at
each arm's best rate only, and the changes of weights for the arms that a claim is about.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import lzma
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.bleu import WrittenRow
from lorakin.compare.next_trials import rows_at_best_rate
from lorakin.compare.results import ResultRow

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "evidence" / "claims"
MOVES_OF = ("lora", "dora", "full")
"""Arms whose changes of magnitude and direction are kept."""
WRITTEN = "written.jsonl.xz"
RESTORED = "restored.json"
"""The file of a task's directory that says where the trials ran that it began with."""
MEASURED_HERE = ("step_work", "peak_bytes")
"""Figures of a trial that depend on the machine."""
HEAD = "study"
"""The key of the first line, which says how the task was run."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """The trials of a task, and how they were run.

    Attributes:
        how: versions, the rows of each part, the steps, the measure, and the places: for each
            machine the days on which it ran trials, and how many.
        rows: the trials.
    """

    how: dict[str, Any]
    rows: list[ResultRow]


def path_of(task: str) -> Path:
    """Returns the file of a task."""
    return FOLDER / f"{task}.jsonl.xz"


def save(task: str, archive: Archive) -> Path:
    """Writes the rows of a task, without what the page does not need."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = shortened(archive.rows, str(archive.how["measure"]))
    lines = [json.dumps({HEAD: archive.how}), *(row.as_json() for row in rows)]
    file = path_of(task)
    file.write_bytes(lzma.compress("".join(line + "\n" for line in lines).encode(), preset=9))
    return file


def replace(task: str, archive: Archive) -> Path:
    """Writes the rows of a task in place of the committed ones.

    Raises:
        SystemExit: some of the committed trials are not among the new ones.
    """
    if path_of(task).is_file():
        old = load(task)
        if lost := {row.trial.name for row in old.rows} - {row.trial.name for row in archive.rows}:
            raise SystemExit(
                f"{task}: {len(lost)} committed trials are not in the study's directory, such as "
                f"{min(lost)}; bring them there first (restore), or delete {path_of(task)}"
            )
        places = [
            {**place, "days": sorted({*place["days"], *before["days"]})}
            for place, before in itertools.zip_longest(
                archive.how["places"], old.how["places"], fillvalue={"days": ()}
            )
        ]
        archive = dataclasses.replace(archive, how={**archive.how, "places": places})
    return save(task, archive)


def load(task: str) -> Archive:
    """Reads the rows of a task."""
    text = lzma.decompress(path_of(task).read_bytes()).decode()
    first, *lines = text.splitlines()
    return Archive(json.loads(first)[HEAD], [ResultRow.from_json(line) for line in lines])


def on_the_first_machine(archive: Archive, plain: str) -> list[ResultRow]:
    """Returns the rows with the times and the memory that they would have on the first machine.

    Machines differ by what a step of plain LoRA, the arm `plain`, takes on each. On a machine that
    did not run it these figures are not known, and are 0.
    """
    found: list[ResultRow] = []
    first: dict[str, float] = {}
    for place in archive.how["places"]:
        rows = archive.rows[len(found) :][: place["trials"]]
        scales = dict.fromkeys(MEASURED_HERE, 0.0)
        for name in MEASURED_HERE:
            known = [getattr(row, name) for row in rows if row.trial.arm == plain]
            if known := [value for value in known if value]:
                own = statistics.median(known)
                scales[name] = first.setdefault(name, own) / own
        found += [_scaled(row, scales) for row in rows]
    return found


def _scaled(row: ResultRow, scales: dict[str, float]) -> ResultRow:
    values = {name: getattr(row, name) * scale for name, scale in scales.items()}
    return dataclasses.replace(row, **(values | {"peak_bytes": round(values["peak_bytes"])}))


def save_written(task: str, rows: Sequence[WrittenRow]) -> Path:
    """Writes what a task's adapters wrote."""
    file = FOLDER / f"{task}-{WRITTEN}"
    lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
    file.write_bytes(lzma.compress(lines.encode(), preset=9))
    return file


def load_written(task: str) -> list[WrittenRow]:
    """Reads what a task's adapters wrote; nothing where that was not looked at."""
    file = FOLDER / f"{task}-{WRITTEN}"
    text = lzma.decompress(file.read_bytes()).decode() if file.is_file() else ""
    return [WrittenRow(**json.loads(line)) for line in text.splitlines()]


def shortened(rows: Sequence[ResultRow], measure: str) -> list[ResultRow]:
    """Returns the rows with fewer figures (see the top of this file)."""
    best = {
        row.trial
        for arm in {row.trial.arm for row in rows}
        for row in rows_at_best_rate(arm, rows, measure)
    }
    return [_shortened(row, row.trial in best) for row in rows]


def _shortened(row: ResultRow, is_best: bool) -> ResultRow:
    answers = row.answers if is_best else None
    if answers is not None:
        # A class says enough of a row; where a row has many tokens, its loss is what counts.
        digits = 2 if answers.given else 4
        losses = [float(f"{loss:.{digits}g}") for loss in answers.losses]
        answers = dataclasses.replace(answers, losses=losses)
    keeps_moves = is_best and row.trial.arm in MOVES_OF
    return dataclasses.replace(
        row,
        answers=answers,
        layers={},
        moves=row.moves if keeps_moves else [],
        losses=[float(f"{loss:.3g}") for loss in row.losses],
    )
