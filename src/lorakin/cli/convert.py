"""The command `lorakin convert`: reads another library's file, and saves it as an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorakin.cli.options import Json, Model, console_for, examples, print_json
from lorakin.waiting import waiting

EXAMPLES = examples("lorakin convert adapters.safetensors --model smollm2 --out adapter")


def command(
    source: Annotated[
        Path,
        typer.Argument(help="A file of loralib, torchtune, mlx-lm or kohya, or its directory."),
    ],
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="A new directory for the adapter.")],
    alpha: Annotated[
        float | None,
        typer.Option(
            help="alpha, for files that do not hold it, such as loralib's; the scale is alpha/rank."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read another library's LoRA file and save it in PEFT's layout."""
    import lorakin as lk
    from lorakin.serving.output import new_directory
    from lorakin.training.models import load_model

    with waiting("converting"), new_directory(out) as partial:
        converted = lk.convert(load_model(model, "base").model, source, alpha=alpha)
        converted.adapter.save(partial)
    if as_json:
        print_json({"out": out, "format": converted.format, "notes": converted.notes})
        return
    console = console_for(False)
    console.print(f"{converted.format} adapter in {out}: {converted.adapter!r}")
    for note in converted.notes:
        console.print(f"note: {note}")
