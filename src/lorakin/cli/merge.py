"""The command `lorakin merge`: writes the model with the adapter merged into its weights."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakin.cli import export
from lorakin.cli.options import (
    AdapterArgument,
    AdapterOption,
    Json,
    MaxKL,
    OptionalModel,
    OtherBase,
    Verify,
    chosen_adapter,
    examples,
)

EXAMPLES = examples(
    "lorakin merge adapter --out merged",
    "lorakin merge --adapter adapter --model smollm2 --out merged",
)


def command(
    out: Annotated[str, typer.Option("--out", "-o", help="A new directory for the merged model.")],
    adapter: AdapterArgument = None,
    adapter_option: AdapterOption = None,
    model: OptionalModel = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of the merged weights: base (as the base model's are stored), float32, "
            "bfloat16, float16."
        ),
    ] = "base",
    verify: Verify = True,
    max_kl: MaxKL = None,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model and save a plain transformers model.

    This is the same as `lorakin export --to merged`.
    """
    from lorakin.serving.job import ExportRequest

    request = ExportRequest(
        adapter=chosen_adapter(adapter, adapter_option), to="merged", out=out, model=model,
        dtype=dtype, max_kl=max_kl, verify=verify, other_base=other_base,
    )  # fmt: skip
    export.run(request, as_json)
