"""`lorakin demo`"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lorakin.cli.options import console_for, examples

if TYPE_CHECKING:
    from lorakin.training.train import Result, Run

EXAMPLES = examples("lorakin demo", "lorakin demo --steps 100 --out longer")
TRAIN, HELD_OUT, PROMPT = "train.jsonl", "held_out.jsonl", "prompt.txt"
SHOWN, HELD_OUT_ROWS, ANSWER_TOKENS = 3, 96, 40

Rows = list[dict[str, str]]


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="A directory for everything; replaced if a demo made it.")] = Path(
        "demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
) -> None:
    """Fine-tune SmolLM2-135M to write one-line docstrings, on Python's own standard library: some minutes on two cores."""
    from lorakin.training import train as training
    from lorakin.training.recipe import Recipe

    console = console_for(False)
    console.print(
        "[bold]demo[/]   one-line docstrings for Python functions, learned from the standard library", highlight=False
    )
    held_out = _write_data(out)
    recipe = Recipe(
        model="smollm2",
        data=[str(out / TRAIN)],
        eval_data=str(out / HELD_OUT),
        out=str(out / "adapter"),
        lr=1e-3,
        steps=steps,
        max_length=320,
    )
    run = training.prepare(recipe, console)
    shown = [row for row in held_out if len(row["prompt"]) < 300][:SHOWN]
    before = _answers(run, shown)
    result = training.train(run)
    after = _answers(run, shown)
    _show_answers(console, shown, before, after)
    _show_result(console, out, result)


def _write_data(out: Path) -> Rows:
    """Put the training and held-out rows into `out`, a new directory or one that a demo made; returns the held-out rows."""
    from lorakin.errors import OutputError
    from lorakin.training.docstrings import INSTRUCTION, docstring_rows

    if (out / TRAIN).is_file() and (out / HELD_OUT).is_file():
        shutil.rmtree(out)
    elif out.exists() and any(out.iterdir()):
        raise OutputError(f"--out {out} is not empty and no demo made it; choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    rows = docstring_rows()
    for name, part in ((HELD_OUT, rows[:HELD_OUT_ROWS]), (TRAIN, rows[HELD_OUT_ROWS:])):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (out / PROMPT).write_text(INSTRUCTION + "def f(a, b):\n    return a if a > b else b\n", encoding="utf-8")
    return rows[:HELD_OUT_ROWS]


def _answers(run: Run, rows: Rows) -> list[str]:
    from lorakin.training.generate import answer

    return [answer(run.loaded, row["prompt"], max_new_tokens=ANSWER_TOKENS) for row in rows]


def _show_answers(console: Console, rows: Rows, before: list[str], after: list[str]) -> None:
    console.rule("three held-out functions")
    for row, old, new in zip(rows, before, after, strict=True):
        console.print(row["prompt"].split("\n\n", 1)[1], style="dim", markup=False, highlight=False)
        for label, text in (("its author", row["completion"]), ("before", old), ("after", new)):
            console.print(f"  [bold]{label:<10}[/] ", end="")
            console.print(" ⏎ ".join(text.splitlines()) or "(nothing)", markup=False, highlight=False)
        console.print()


def _show_result(console: Console, out: Path, result: Result) -> None:
    from lorakin.training import train as training
    from lorakin.training.progress import peak_memory_bytes

    adapter = result.out
    lines = {
        "held out before": training.described(result.before),
        "held out after": training.described(result.after),
        "perplexity": f"{(result.after.perplexity or 0) / (result.before.perplexity or 1):.2f} of the base's",
        "trained": f"{result.trainable_parameters:,} parameters in {result.steps} steps, {result.seconds:.0f} s",
        "peak memory": f"{peak_memory_bytes() / 2**30:.1f} GiB",
        "adapter": f"{adapter} ({result.adapter_bytes / 2**20:.1f} MiB, PEFT's format)",
        "loss curve": str(adapter / training.PICTURE),
        "metrics": str(adapter / training.METRICS),
        "recipe": str(adapter / training.RECIPE),
    }
    console.rule("result")
    for label, value in lines.items():
        console.print(f"[bold]{label:<16}[/] {value}", highlight=False)
    console.print("\n[bold]next[/]")
    for line in (
        f"generate --model smollm2 --adapter {adapter} --prompt - < {out / PROMPT}",
        f"evaluate --model smollm2 --adapter {adapter} --data {out / HELD_OUT}",
        f"inspect {adapter}",
        f"merge --model smollm2 --adapter {adapter} --out {out / 'merged'}",
        f"train {adapter / training.RECIPE} --steps 200 --out {out / 'longer'}",
    ):
        console.print(f"  {_as_typed_here()} {line}", markup=False, highlight=False)


def _as_typed_here() -> str:
    """The command as a user in this directory would type it: `.venv/bin/lorakin` where make put it."""
    path = Path(sys.argv[0]).absolute()
    if path.name != "lorakin" or shutil.which("lorakin") == str(path):
        return "lorakin"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
