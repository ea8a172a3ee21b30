"""All commands together, and the code with which the process ends."""

from __future__ import annotations

import io
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from lorakin.cli import (
    chat,
    combine,
    compare,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    lr_find,
    merge,
    methods,
    pause,
    plan,
    push,
    serve,
    stop,
    train,
    ui,
)
from lorakin.cli.verbosity import Quiet, Verbose, chosen, is_first, with_verbosity
from lorakin.errors import LorakinError, LorakinWarning
from lorakin.library_logs import calm_libraries
from lorakin.terminal import Terminal, labelled, shortened

INTERRUPTED = 130  # typer's exit code after Ctrl-C
CLOSED_PIPE = 141  # the exit code that a shell shows for SIGPIPE


def flowing(text: str | None) -> str:
    """Returns a docstring with each paragraph on one line, for the terminal to break.

    >>> flowing("One line.\\n\\n    A paragraph\\n    of two lines.")
    'One line.\\n\\nA paragraph of two lines.'
    """
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


app = typer.Typer(
    help="Fine-tune a language model or classifier with the LoRA family, and use the result.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    train,
    pause,
    stop,
    plan,
    lr_find,
    compare,
    data,
    generate,
    chat,
    evaluate,
    export,
    merge,
    combine,
    convert,
    inspect,
    serve,
    push,
    methods,
    doctor,
    demo,
    ui,
):
    name = module.__name__.rpartition(".")[2].replace("_", "-")
    app.command(name, help=flowing(module.command.__doc__), epilog=module.EXAMPLES)(
        with_verbosity(module.command)
    )


@app.callback()
def everywhere(quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Takes what is said before the command's name."""
    chosen.ask(quiet, verbose)


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit code."""
    errors = Terminal(stderr=True, quiet=not is_first())
    shown = warnings.showwarning

    def show_ours(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not issubclass(category, LorakinWarning):
            return shown(message, category, *rest, **more)
        errors.print(labelled("warning: ", shortened(str(message)), "bold yellow"))
        return None

    warnings.showwarning = show_ours
    chosen.quiet = chosen.verbose = False
    calm_libraries()
    try:
        code = app(list(arguments), prog_name="lorakin", standalone_mode=False)
    except LorakinError as error:
        if chosen.verbose:
            errors.print("".join(traceback.format_exception(error)))
        errors.print(labelled("error: ", shortened(str(error)), "bold red"))
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return CLOSED_PIPE
    except Exception as error:
        show = getattr(error, "show", None)  # typer's own usage errors know how to show themselves
        if show is None:
            raise
        message = io.StringIO()
        show(message)
        errors.print(message.getvalue(), end="")
        return int(getattr(error, "exit_code", 2))
    finally:
        warnings.showwarning = shown
    if code == INTERRUPTED:
        errors.print("interrupted")
    return int(code or 0)
