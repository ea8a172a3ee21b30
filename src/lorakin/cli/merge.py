"""The command `lorakin merge`: writes the model with its adapter in the weights."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakin.cli import export
from lorakin.cli.options import AdapterDir, Json, MaxKL, MaybeModel, NoVerify, OtherBase, examples

EXAMPLES = examples("lorakin merge --model smollm2 --adapter adapter --out merged")


def command(
    adapter: AdapterDir,
    out: Annotated[str, typer.Option("--out", "-o", help="A new directory for the merged model.")],
    model: MaybeModel = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the merged weights: base (as the base model's are stored), float32, "
            "bfloat16, float16."
        ),
    ] = "base",
    verify: NoVerify = True,
    max_kl: MaxKL = None,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into its base model and save a plain transformers model.

    The same as `lorakin export --to merged`.
    """
    export.command(
        adapter,
        "merged",
        out,
        model,
        dtype=dtype,
        verify=verify,
        max_kl=max_kl,
        other_base=other_base,
        as_json=as_json,
    )
