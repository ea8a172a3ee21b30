"""The command `lorakin demo`: trains on Python's standard library, and prints what to try next."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from lorakin.cli.options import console_for, examples
from lorakin.cli.verbosity import messages_on
from lorakin.terminal import Terminal, labelled, quoted
from lorakin.terminal import command as shell_command

if TYPE_CHECKING:
    from lorakin.training.train import PreparedRun, Result

EXAMPLES = examples("lorakin demo", "lorakin demo --steps 100 --out longer")
TRAIN, HELD_OUT, PROMPT, ADAPTER = "train.jsonl", "held_out.jsonl", "prompt.txt", "adapter"
RECORD = ".lorakin-demo.json"
"""The list of what a demo wrote: path of a file in its directory → SHA-256 of its content."""
SHOWN, HELD_OUT_ROWS, ANSWER_TOKENS = 3, 96, 40

Rows = list[dict[str, str]]


def command(
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="A directory for everything; an earlier demo in it is replaced."
        ),
    ] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 40,
) -> None:
    """Fine-tune SmolLM2-135M to write one-line docstrings, in a few minutes on two cores.

    The data are functions of Python's own standard library.
    """
    from lorakin.storage import paths
    from lorakin.training import train as training
    from lorakin.training.recipe import Recipe

    out = paths.user_path(out, "--out")
    console = messages_on(False)
    console.print(
        labelled(
            "demo   ", "one-line docstrings for Python functions, learned from the standard library"
        )
    )
    held_out = _write_data(out)
    recipe = Recipe(
        model="smollm2",
        data=[str(out / TRAIN)],
        eval_data=str(out / HELD_OUT),
        out=str(out / ADAPTER),
        lr=1e-3,
        steps=steps,
        max_length=320,
    )
    with _recording(out):
        run = training.prepare(recipe, console)
        shown = [row for row in held_out if len(row["prompt"]) < 300][:SHOWN]
        before = _answers(run, shown)
        result = training.train(run)
    after = _answers(run, shown)
    _show_answers(console_for(False), shown, before, after)
    _show_result(console_for(False), out, result)


def _write_data(out: Path) -> Rows:
    """Writes the training and held-out rows into `out`; returns the held-out rows.

    Raises:
        OutputError: the directory is not empty and no demo made it, or a demo would overwrite
            files.
    """
    from lorakin.errors import OutputError
    from lorakin.training.docstrings import INSTRUCTION, docstring_rows

    if out.is_dir() and any(out.iterdir()):
        _clear(out)
    rows = docstring_rows()
    parts = {HELD_OUT: rows[:HELD_OUT_ROWS], TRAIN: rows[HELD_OUT_ROWS:]}
    texts = {name: "".join(json.dumps(row) + "\n" for row in part) for name, part in parts.items()}
    texts[PROMPT] = INSTRUCTION + "def f(a, b):\n    return a if a > b else b\n"
    with _recording(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                # Mode "x" fails if a file or a link is there.
                with open(out / name, "x", encoding="utf-8") as file:
                    file.write(text)
        except OSError as error:
            raise OutputError(
                f"cannot write to --out {out}: {error.strerror or error}; choose another directory"
            ) from error
    return rows[:HELD_OUT_ROWS]


def _clear(out: Path) -> None:
    """Removes what an earlier demo wrote into `out`: files that are still as it wrote them."""
    from lorakin.errors import OutputError

    try:
        digests = json.loads((out / RECORD).read_text(encoding="utf-8"))
        are_texts = all(isinstance(digest, str) for digest in digests.values())
        if (out / RECORD).is_symlink() or not are_texts:
            raise ValueError
    except (OSError, ValueError, AttributeError, RecursionError):
        raise OutputError(
            f"--out {out} is not empty and no demo made it; choose another directory"
        ) from None
    entries = _entries(out)
    files = [path for path in entries if not _is_folder(path)]
    changed = [
        path
        for path in files
        if not _is_file(path) or digests.get(_name(out, path)) != _digest(path)
    ]
    if changed:
        raise OutputError(
            f"--out {out}: {changed[0]} is not as an earlier demo left it; move it, or choose "
            "another directory"
        )
    for path in reversed(entries):
        path.rmdir() if _is_folder(path) else path.unlink()
    (out / RECORD).unlink()


def _entries(out: Path) -> list[Path]:
    """Returns the existing paths in `out` where a demo writes, a folder before what is in it."""
    ours = [out / name for name in (TRAIN, HELD_OUT, PROMPT, ADAPTER)]
    inside = sorted((out / ADAPTER).rglob("*")) if _is_folder(out / ADAPTER) else []
    return [path for path in (*ours, *inside) if path.exists() or path.is_symlink()]


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _name(out: Path, path: Path) -> str:
    return path.relative_to(out).as_posix()


@contextlib.contextmanager
def _recording(out: Path) -> Iterator[None]:
    """Records the files in `out` as a demo's at the end, also after an error."""
    try:
        yield
    finally:
        if out.is_dir():
            digests = {_name(out, path): _digest(path) for path in _entries(out) if _is_file(path)}
            (out / RECORD).unlink(missing_ok=True)
            (out / RECORD).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _answers(run: PreparedRun, rows: Rows) -> list[str]:
    from lorakin.training.generate import answer

    return [answer(run.loaded, row["prompt"], max_new_tokens=ANSWER_TOKENS) for row in rows]


def _show_answers(console: Terminal, rows: Rows, before: list[str], after: list[str]) -> None:
    console.rule("three held-out functions")
    for row, old, new in zip(rows, before, after, strict=True):
        console.print(row["prompt"].split("\n\n", 1)[1], style="dim")
        for label, text in (("its author", row["completion"]), ("before", old), ("after", new)):
            console.print(labelled(f"  {label:<10} ", " ⏎ ".join(text.splitlines()) or "(nothing)"))
        console.print()


def _show_result(console: Terminal, out: Path, result: Result) -> None:
    from lorakin.training.evaluate import described
    from lorakin.training.progress import peak_memory_bytes
    from lorakin.training.run_directory import METRICS, PICTURE, RECIPE

    adapter = result.out
    lines = {
        "held out before": described(result.before),
        "held out after": described(result.after),
        "perplexity": f"{(result.after.perplexity or 0) / (result.before.perplexity or 1):.2f} of "
        "the base's",
        "trained": f"{result.trainable_parameters:,} parameters in {result.steps} steps, "
        f"{result.seconds:.0f} s",
        "peak memory": f"{peak_memory_bytes() / 2**30:.1f} GiB",
        "adapter": f"{adapter} ({result.adapter_bytes / 2**20:.1f} MiB, PEFT's format)",
        "loss curve": str(adapter / PICTURE),
        "metrics": str(adapter / METRICS),
        "recipe": str(adapter / RECIPE),
    }
    console.rule("result")
    for label, value in lines.items():
        console.print(labelled(f"{label:<16} ", value))
    console.print(Text("\nnext", "bold"))
    model, with_adapter = ("--model", "smollm2"), ("--adapter", adapter)
    for line in (
        f"{shell_command('generate', *model, *with_adapter, '--prompt', '-')} < "
        f"{quoted(out / PROMPT)}",
        shell_command("evaluate", *model, *with_adapter, "--data", out / HELD_OUT),
        shell_command("inspect", adapter),
        shell_command("merge", adapter, *model, "--out", out / "merged"),
        shell_command("train", adapter / RECIPE, "--steps", 200, "--out", out / "longer"),
    ):
        console.print(f"  {quoted(_as_typed_here())} {line}")


def _as_typed_here() -> str:
    """Returns the command as a user types it here: `.venv/bin/lorakin` if make installed it so."""
    path = Path(sys.argv[0]).absolute()
    if path.name != "lorakin" or shutil.which("lorakin") == str(path):
        return "lorakin"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
