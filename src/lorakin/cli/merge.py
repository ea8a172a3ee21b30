"""`lorakin merge`"""

from __future__ import annotations

from typing import Annotated

import typer

from lorakin.cli.options import AdapterDir, Json, Model, console_for, examples, print_json

EXAMPLES = examples("lorakin merge --model smollm2 --adapter adapter --out merged")


def command(
    model: Model,
    adapter: AdapterDir,
    out: Annotated[str, typer.Option("--out", "-o", help="A new directory for the merged model.")],
    dtype: Annotated[
        str, typer.Option(help="Of the merged weights: base (as the base model's are stored), float32, bfloat16, float16.")
    ] = "base",
    as_json: Json = False,
) -> None:
    """Fold an adapter into its base model and save a plain transformers model with its tokenizer."""
    from lorakin.training.merge import merge

    size = merge(model, adapter, out, dtype)
    if as_json:
        print_json({"out": out, "bytes": size})
    else:
        console_for(False).print(f"merged model in {out} ({size / 2**20:,.0f} MiB)", highlight=False)
