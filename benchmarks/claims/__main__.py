"""`python -m benchmarks.claims run --data folder --out claims`: see `--help`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.claims import arms
from benchmarks.claims.study import SEEDS, run_task
from benchmarks.claims.tasks import TASKS, task_named

GROUPS = {"pilot": arms.PILOT, "main": arms.MAIN, "all": None}


def main() -> None:
    """Runs a part of the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("run",))
    parser.add_argument("--data", default="hub", help="the folder with the data, or hub")
    parser.add_argument("--out", type=Path, default=Path("claims"))
    parser.add_argument("--tasks", nargs="*", default=[task.name for task in TASKS])
    parser.add_argument("--arms", choices=GROUPS, default="all")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--devices", default="cpu,cpu")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    for name in options.tasks:
        console.rule(name)
        run_task(
            task_named(name), options.data, options.out, GROUPS[options.arms], options.seeds,
            options.devices, console,
        )  # fmt: skip


if __name__ == "__main__":
    main()
