"""The command `lorakin export`: writes files for other programs, and checks what they compute."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from lorakin.cli.options import (
    Json,
    MaxKL,
    MaybeModel,
    NoVerify,
    OtherBase,
    console_for,
    examples,
    print_json,
)

EXAMPLES = examples(
    "lorakin export adapter --to lora --portable --out plain",
    "lorakin export adapter --to lora --rank 32 --data rows.jsonl --out plain",
    "lorakin export adapter --to gguf --out for-llama-cpp",
    "lorakin export adapter --to gguf-merged --dtype q8_0 --out for-ollama",
)


ADAPTER_HELP = "An adapter's directory, lorakin's or PEFT's, or a hub id."
TO_HELP = "lora, merged, gguf or gguf-merged: adapters and whole models."
RANK_HELP = "The largest rank of a module; DoRA needs this or --error."
ERROR_HELP = "The smallest rank whose relative error is at most this, in each module."
DATA_HELP = "Rows like those of training: the outputs on them count, and they are read."
PORTABLE_HELP = "One rank and scale 1, which vLLM needs."
DTYPE_HELP = "Of what is written: float32, float16, bfloat16; base (merged), q8_0 (gguf-merged)."


def command(
    adapter: Annotated[str, typer.Argument(help=ADAPTER_HELP)],
    to: Annotated[str, typer.Option("--to", help=TO_HELP)],
    out: Annotated[str, typer.Option("--out", "-o", help="A new directory.")],
    model: MaybeModel = None,
    rank: Annotated[int | None, typer.Option(help=RANK_HELP)] = None,
    error: Annotated[float | None, typer.Option(help=ERROR_HELP)] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help=DATA_HELP)] = None,
    portable: Annotated[bool, typer.Option("--portable", help=PORTABLE_HELP)] = False,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    verify: NoVerify = True,
    max_kl: MaxKL = None,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Write an adapter as other programs serve it, and compare that with the trained model.

    Plain LoRA, a merged model, or either as GGUF.
    """
    from lorakin.errors import ModelError, VerificationError
    from lorakin.serving.export import export
    from lorakin.serving.job import ExportRequest

    request = ExportRequest(
        adapter, to, out, model, dtype, rank, error, portable, data, max_kl, verify, other_base
    )
    try:
        exported = export(request)
    except VerificationError as error:
        if as_json:
            with contextlib.suppress(ModelError):  # of NaN the error says more
                print_json(dict(error.report))
        raise
    if as_json:
        print_json(exported.as_dict())
        return
    console = console_for(False)
    for line in exported.lines():
        console.print(line)
