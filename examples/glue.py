"""GLUE and E2E NLG by the command line: one `lorakin train` and one `lorakin evaluate` each.

    make glue DATA=folder     (or: python examples/glue.py --data folder [--out glue] [--only mrpc])

The folder holds `cola_train.jsonl`, `cola_heldout.jsonl` and so on, for CoLA, MRPC, RTE, SST-2 and
E2E NLG. Hub data sets have the same columns: `nyu-mll/glue:cola:train`, `nyu-mll/glue:cola:validation`.

Beside each classifier stands the head alone, trained in the same way on the frozen base; beside E2E
stands the base. Figures are of the last step: nothing is chosen by the held-out rows. A run that
was interrupted goes on where it was. The table is written to OUT/table.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

MEANINGS = 60
"""Meanings of E2E's held-out rows that are evaluated: all references of each."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One data set: the model, what `lorakin train` is given, and the metrics to report."""

    name: str
    model: str
    options: str
    metrics: tuple[str, ...]

    @property
    def has_head(self) -> bool:
        """Whether it has classes, so that the head alone is trained too."""
        return self.model == "minilm"


CLASSIFIER = "--lr 1e-3 --batch-size 32 --max-length 128"
SLOW = "--lr 4e-4 --batch-size 32 --max-length 128 --group-by-length"
"""For CoLA, which the higher rate does not learn: found on 1,000 of its training rows."""
BENCHMARKS = (
    Benchmark("mrpc", "minilm", f"{CLASSIFIER} --epochs 4", ("f1", "accuracy")),
    Benchmark("rte", "minilm", f"{CLASSIFIER} --epochs 3", ("accuracy",)),
    Benchmark("cola", "minilm", f"{SLOW} --epochs 6", ("matthews", "accuracy")),
    Benchmark("sst2", "minilm", f"{CLASSIFIER} --epochs 2", ("accuracy",)),
    Benchmark(
        "e2e", "smollm2", "--lr 1e-3 --batch-size 8 --steps 60", ("bleu", "chrf", "rouge_l", "loss")
    ),
)


def main() -> None:
    """Trains, evaluates, writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the folder with the data")
    parser.add_argument("--out", type=Path, default=Path("glue"))
    parser.add_argument("--only", choices=[one.name for one in BENCHMARKS], action="append")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for benchmark in BENCHMARKS:
        if options.only is None or benchmark.name in options.only:
            lines += table_lines(benchmark, options.data, options.out)
            (options.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def table_lines(benchmark: Benchmark, data: Path, out: Path) -> list[str]:
    """Runs one benchmark, and returns its commands and its rows of the table."""
    train, held_out = (data / f"{benchmark.name}_{part}.jsonl" for part in ("train", "heldout"))
    if not benchmark.has_head:
        held_out = some_meanings(held_out, out / f"{benchmark.name}_heldout.jsonl")
    adapter = out / benchmark.name
    commands = [
        f"lorakin train -m {benchmark.model} -d {train} --eval-data {held_out} "
        f"{benchmark.options} -o {adapter}"
    ]
    beside = "--base --generate --max-new-tokens 80"
    if benchmark.has_head:
        head = out / f"{benchmark.name}-head"
        commands.append(commands[0].replace(f"-o {adapter}", f"--targets none -o {head}"))
        beside = f"-a {head}"
    for command in commands:
        run(command, Path(command.split()[-1]) / "run.json")
    evaluate = f"lorakin evaluate -m {benchmark.model} -d {held_out} {beside} -a {adapter}"
    found = run(evaluate, out / f"{benchmark.name}.json")
    other = found["others"][0]
    split = f"{other['better']} of {other['differ']}, p = {other['p']:.2g}"
    names = ("head alone" if benchmark.has_head else "the base", "LoRA")
    rows = [
        f"| {benchmark.name} | {metric} | {shown(found, metric)} | {shown(other, metric)} | {split} |"
        for metric in benchmark.metrics
    ]
    return [
        "", *(f"    {command}" for command in commands), f"    {evaluate}", "",
        f"| | | {names[0]} | {names[1]} | {names[1]} better, of those that differ |", "|---|---|---|---|---|",
        *rows,
    ]  # fmt: skip


def some_meanings(source: Path, target: Path) -> Path:
    """Writes the rows of the first meanings, with all their references, and returns the file."""
    lines = source.read_text(encoding="utf-8").splitlines()
    prompts = list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))[:MEANINGS]
    kept = [line for line in lines if json.loads(line)["prompt"] in prompts]
    target.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return target


def run(command: str, result: Path) -> dict[str, Any]:
    """Runs a command with --json unless its result is there, and returns the result."""
    if not result.is_file():
        print(command, flush=True)
        words = [sys.executable, "-m", *shlex.split(command), "--json"]
        folder = Path(words[-2])
        if "train" in words and (folder / "recipe.yaml").is_file():
            words = [*words[:4], "--resume", "--out", str(folder), "--json"]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        result.write_text(done.stdout, encoding="utf-8")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def shown(figures: dict[str, Any], metric: str) -> str:
    """Returns a figure with its interval over the rows."""
    low, high = (figures.get(f"{metric}_{end}") for end in ("low", "high"))
    interval = "" if low is None else f" ({low:.3g}–{high:.3g})"
    return f"{figures[metric]:.3g}{interval}"


if __name__ == "__main__":
    main()
