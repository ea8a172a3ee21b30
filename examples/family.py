"""Trains all members on two real models with `lorakin train`, and shows what each costs.

    make family        (or: python examples/family.py [--quick] [--out family])

SmolLM2-135M learns one-line docstrings; MiniLM with a new head learns the sentiment of movie
reviews. All members see the same rows, seed, batches and steps. Each has its usual learning rate
times one factor for all, because short runs need larger rates. Nothing is tuned and there is one
seed, so the table shows that each member works and what it costs, not which one is best.

Time is a training step over LoRA's: median (lowest–highest), all members in turns in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from movie_sentiment import snippets
from rich.console import Console

import lorakin as lk
from lorakin.family import FAMILY, Method, member_named, method_named
from lorakin.training.batches import answer_loss
from lorakin.training.docstrings import docstring_rows
from lorakin.training.probe import measured_by
from lorakin.training.recipe import Recipe
from lorakin.training.train import PreparedRun, prepare


@dataclasses.dataclass(frozen=True)
class Task:
    """One model on one data set."""

    model: str
    title: str
    measure: str
    steps: int
    faster: float
    flags: tuple[str, ...]
    rows: int
    held_out: int


TASKS = (
    Task(
        "smollm2",
        "SmolLM2-135M, docstrings",
        "loss",
        40,
        5,
        ("--batch-size", "8", "--max-length", "320"),
        640,
        96,
    ),
    Task(
        "minilm",
        "MiniLM, movie reviews",
        "accuracy",
        150,
        10,
        ("--batch-size", "32", "--max-length", "128"),
        8612,
        1000,
    ),
)


def settings_of(word: str, steps: int) -> dict[str, Any]:
    """Returns the settings of a short run: Delta-LoRA begins after a quarter of it."""
    return {"start_step": steps // 4} if "start_step" in member_named(word).setting_names() else {}


def write_data(task: Task, folder: Path) -> None:
    """Writes the task's rows into `train.jsonl` and `held_out.jsonl`."""
    rows: list[Any] = docstring_rows() if task.model == "smollm2" else snippets()
    for name, part in (
        ("held_out", rows[: task.held_out]),
        ("train", rows[task.held_out : task.held_out + task.rows]),
    ):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in part), encoding="utf-8"
        )


def train(task: Task, word: str, folder: Path, steps: int) -> dict[str, Any]:
    """Runs `lorakin train --method word` in a process, if not done before; returns its result."""
    known = folder / f"{word}.json"
    if known.is_file():
        return dict(json.loads(known.read_text()))
    shutil.rmtree(folder / word, ignore_errors=True)
    method = method_named(word, settings_of(word, steps))
    lr, out = task.faster * method.learning_rate, folder / word
    command = [
        sys.executable,
        "-c",
        "from lorakin.cli import main; main()",
        "train",
        "--json",
        "--method",
        word,
        "--lr",
        str(lr),
    ]
    command += ["--model", task.model, "--steps", str(steps), "--out", str(out), *task.flags]
    command += [
        "--data",
        str(folder / "train.jsonl"),
        "--eval-data",
        str(folder / "held_out.jsonl"),
    ]
    for name, value in settings_of(word, steps).items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = {"word": word, "lr": lr, **json.loads(done.stdout)}
    known.write_text(json.dumps(result))
    return result


def step_times(task: Task, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Returns word → seconds of one training step in each round.

    The members run in turns, in reverse order every other round.
    """
    console = Console(quiet=True)
    models: dict[str, tuple[PreparedRun, Any, torch.optim.Optimizer]] = {}
    for member in FAMILY:
        flags = dict(
            zip(
                (f.removeprefix("--").replace("-", "_") for f in task.flags[::2]),
                task.flags[1::2],
                strict=True,
            )
        )
        recipe = Recipe(
            model=task.model,
            data=str(folder / "train.jsonl"),
            eval_data=str(folder / "held_out.jsonl"),
            out=str(folder / "timed" / member.word),
            steps=100,
            **flags,  # type: ignore[arg-type]
        )
        run = prepare(recipe, console)
        whole = list(run.adapter.placement.whole_modules)
        run.adapter.remove()
        method: Method = method_named(member.word, settings_of(member.word, 1))
        if method.needed_probe is not None:
            method = method.with_importance(
                json.loads((folder / member.word / "importance.json").read_text())
            )
        adapter = lk.adapt(
            run.loaded.model, method, modules_to_save=whole, **measured_by(run, method)
        )
        run.loaded.model.train()
        models[member.word] = (run, adapter, adapter.optimizer(lr=1e-4, total_steps=10_000))
    run = models[FAMILY[0].word][0]
    batches = [run.collator()(run.train.examples[n * 8 : n * 8 + 8]) for n in range(rounds)]
    times: dict[str, list[float]] = {word: [] for word in models}
    for number, batch in enumerate(batches):
        for word in list(models)[:: 1 if number % 2 else -1]:
            run, _, optimizer = models[word]
            started = time.perf_counter()
            outputs = run.loaded.model(
                **{k: v for k, v in batch.items() if k != "labels" or run.labels is not None}
            )
            (
                outputs.loss if run.labels is not None else answer_loss(outputs, batch["labels"])
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
            times[word].append(time.perf_counter() - started)
    return {word: seconds[1:] for word, seconds in times.items()}  # the first round warms up


def frozen_shared(folder: Path) -> int:
    """Returns how many frozen numbers the adapter's modules share."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shared = [key for key in file.keys() if key.startswith("base_model.vera")]  # noqa: SIM118
        return sum(file.get_tensor(key).numel() for key in shared)


def table(
    task: Task, results: list[dict[str, Any]], times: dict[str, list[float]], folder: Path
) -> str:
    """Returns the task's results as Markdown."""
    name = "held-out loss" if task.measure == "loss" else "held-out accuracy"
    lines = [
        f"### {task.title}, {results[0]['steps']} steps",
        "",
        f"| member | learning rate | {name} before | after | trained | frozen shared "
        "| step time, × LoRA | adapter, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        word = result["word"]
        ratios = [
            mine / base for mine, base in zip(times[word], times[FAMILY[0].word], strict=True)
        ]
        before, after = (result[when][task.measure] for when in ("before", "after"))
        shown = (
            f"{before:.3f} | {after:.3f}"
            if task.measure == "loss"
            else f"{before:.1%} | {after:.1%}"
        )
        trained, shared = f"{result['trainable_parameters']:,}", frozen_shared(folder / word)
        lines.append(
            f"| `{word}` | {result['lr']:g} | {shown} | {trained} "
            f"| {f'{shared:,}' if shared else '–'} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) "
            f"| {result['adapter_bytes'] / 2**20:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains everything, times everything, and writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps on a few rows: does it run?"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("family"),
        help="where everything goes; what is there is not trained again",
    )
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    tables = [
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, lorakin {lk.__version__}\n"
    ]
    for task in TASKS:
        if options.quick:
            task = dataclasses.replace(task, rows=160, held_out=16)
        steps = 8 if options.quick else task.steps
        folder = options.out / task.model
        if not folder.exists():
            folder.mkdir(parents=True)
            write_data(task, folder)
        results = []
        for member in FAMILY:
            console.rule(f"{task.title}: {member.word}")
            results.append(train(task, member.word, folder, steps))
        console.rule(f"{task.title}: step times")
        times = step_times(task, folder, 4 if options.quick else 12)
        tables.append(table(task, results, times, folder))
        console.print(tables[-1], highlight=False, markup=False)
        (options.out / "family.md").write_text("\n".join(tables), encoding="utf-8")
    console.print(f"the tables are in {options.out / 'family.md'}", highlight=False)


if __name__ == "__main__":
    main()
