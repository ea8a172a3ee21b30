"""`lorakin demo`"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakin.cli.options import console_for, examples

if TYPE_CHECKING:
    from lorakin.training.train import Run

EXAMPLES = examples("lorakin demo", "lorakin demo --steps 100 --out longer")
SHOWN, HELD_OUT, ANSWER_TOKENS = 3, 96, 40


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="A directory for everything; replaced if a demo made it.")] = Path(
        "demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
) -> None:
    """Fine-tune SmolLM2-135M to write one-line docstrings, on Python's own standard library: some minutes on two cores."""
    from lorakin.errors import OutputError
    from lorakin.training import train as training
    from lorakin.training.docstrings import INSTRUCTION, docstring_rows
    from lorakin.training.recipe import Recipe

    console = console_for(False)
    if (out / "train.jsonl").is_file() and (out / "held_out.jsonl").is_file():
        shutil.rmtree(out)
    elif out.exists() and any(out.iterdir()):
        raise OutputError(f"--out {out} is not empty and no demo made it; choose another directory")
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        "[bold]demo[/]   one-line docstrings for Python functions, learned from the standard library", highlight=False
    )
    rows = docstring_rows()
    held_out, train_rows = rows[:HELD_OUT], rows[HELD_OUT:]
    for name, part in (("held_out.jsonl", held_out), ("train.jsonl", train_rows)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    (out / "prompt.txt").write_text(INSTRUCTION + "def f(a, b):\n    return a if a > b else b\n", encoding="utf-8")
    recipe = Recipe(
        model="smollm2",
        data=str(out / "train.jsonl"),
        eval_data=str(out / "held_out.jsonl"),
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
    console.rule("three held-out functions")
    for row, old, new in zip(shown, before, after, strict=True):
        code = row["prompt"].split("\n\n", 1)[1]
        console.print(code, style="dim", markup=False, highlight=False)
        for title, text in (("written by", row["completion"]), ("before", old), ("after", new)):
            label = "its author" if title == "written by" else title
            console.print(f"  [bold]{label:<10}[/] ", end="")
            console.print(" ⏎ ".join(text.splitlines()) or "(nothing)", markup=False, highlight=False)
        console.print()
    console.rule("result")
    adapter = result.out
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    lines = {
        "held out before": training.described(result.before),
        "held out after": training.described(result.after),
        "perplexity": f"{(result.after.perplexity or 0) / (result.before.perplexity or 1):.2f} of the base's",
        "trained": f"{result.trainable_parameters:,} parameters in {steps} steps, {result.seconds:.0f} s",
        "peak memory": f"{peak:.1f} GiB",
        "adapter": f"{adapter} ({result.adapter_bytes / 2**20:.1f} MiB, PEFT's format)",
        "loss curve": str(adapter / training.PICTURE),
        "metrics": str(adapter / training.METRICS),
        "recipe": str(adapter / training.RECIPE),
    }
    for label, value in lines.items():
        console.print(f"[bold]{label:<16}[/] {value}", highlight=False)
    console.print("\n[bold]next[/]")
    command = Path(sys.argv[0]).resolve() if Path(sys.argv[0]).name == "lorakin" else "lorakin"
    for line in (
        f"generate --model smollm2 --adapter {adapter} --prompt - < {out / 'prompt.txt'}",
        f"evaluate --model smollm2 --adapter {adapter} --data {out / 'held_out.jsonl'}",
        f"inspect {adapter}",
        f"merge --model smollm2 --adapter {adapter} --out {out / 'merged'}",
        f"train {adapter / training.RECIPE} --steps 200 --out {out / 'longer'}",
    ):
        console.print(f"  {_relative(command)} {line}", markup=False, highlight=False, soft_wrap=True)


def _answers(run: Run, rows: list[dict[str, str]]) -> list[str]:
    from lorakin.training.generate import answer

    return [answer(run.loaded, row["prompt"], max_new_tokens=ANSWER_TOKENS) for row in rows]


def _relative(command: Path | str) -> str:
    """The command as a user here would type it."""
    path = Path(command)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(command)
