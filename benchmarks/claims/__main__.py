"""The study of the papers' claims, part by part.

python -m benchmarks.claims run --data folder       runs trials; what ended is not run again
python -m benchmarks.claims restore --data folder   the committed trials, to go on from elsewhere
python -m benchmarks.claims write --data folder     lets the adapters of E2E write answers
python -m benchmarks.claims design                  what the pilot's rows say of seeds and rows
python -m benchmarks.claims keep --data folder      writes the trials to docs/evidence/claims/
python -m benchmarks.claims page                    makes the page and its pictures from those
python -m benchmarks.claims again sst2 dora 7 --data folder    runs one cell again
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from rich.console import Console

from benchmarks.claims import again, archive, arms, bleu, evidence, page
from benchmarks.claims.design import design
from benchmarks.claims.study import SEEDS, restore, run_task
from benchmarks.claims.tasks import HUB, TASKS, task_named

PARTS = ("run", "restore", "write", "design", "keep", "page", "again")
GROUPS = {"pilot": arms.PILOT, "main": arms.MAIN, "all": None}
PAGE = archive.ROOT / "docs" / "evidence" / "study.md"
WRITES = "e2e"
"""The task whose adapters write answers."""
NAMES = [task.name for task in TASKS]


def main() -> None:
    """Runs a part of the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("cell", nargs="*", help="of again: the task, the arm and the seed")
    parser.add_argument("--data", default=HUB, help="the folder with the data, or hub")
    parser.add_argument("--out", type=Path, default=Path("claims"), help="the study's directory")
    parser.add_argument("--tasks", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--arms", choices=GROUPS, default="all")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--devices", default="cpu,cpu")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    if options.part == "run":
        for name in options.tasks:
            console.rule(name)
            run_task(
                task_named(name), options.data, options.out, GROUPS[options.arms], options.seeds,
                options.devices, console,
            )  # fmt: skip
    elif options.part == "restore":
        for name in options.tasks:
            restore(task_named(name), options.data, options.out, console)
    elif options.part == "write":
        bleu.write_missing(task_named(WRITES), options.out, arms.METHODS, options.seeds)
    elif options.part == "keep":
        day = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        for name in options.tasks:
            if (options.out / name / "results.jsonl").is_file():
                task = task_named(name)
                kept = evidence.archived(task, options.data, options.out, day)
                console.print(str(archive.replace(name, kept)))
                if written := bleu.read(options.out / name / bleu.FILE):
                    console.print(str(archive.save_written(name, written)))
    elif options.part == "page":
        page.write(PAGE, evidence.all_archived())
    elif options.part == "design":
        for found, how in evidence.all_archived():
            console.print(found.task.title, design(found, int(how["seeds"])))
    else:
        name, arm, seed = options.cell
        console.print(str(again.run_again(task_named(name), arm, int(seed), options.data)))


if __name__ == "__main__":
    main()
