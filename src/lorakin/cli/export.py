"""The command `lorakin export`: writes files for other programs, and checks what they compute."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from lorakin.cli.options import (
    AdapterArgument,
    AdapterOption,
    Json,
    MaxKL,
    OptionalModel,
    OtherBase,
    Verify,
    chosen_adapter,
    console_for,
    examples,
    print_json,
)

if TYPE_CHECKING:
    from lorakin.serving.job import ExportRequest

EXAMPLES = examples(
    "lorakin export adapter --to lora --portable --out plain",
    "lorakin export adapter --to lora --rank 32 --data rows.jsonl --out plain",
    "lorakin export adapter --to gguf --out for-llama-cpp",
    "lorakin export adapter --to gguf-merged --dtype q8_0 --out for-ollama",
)


TO_HELP = (
    "What to write: lora or gguf (an adapter), merged or gguf-merged (a whole model, the adapter "
    "merged into it)."
)
RANK_HELP = "The largest rank of a module; DoRA needs this or --error."
ERROR_HELP = "Choose in each module the smallest rank whose relative error is at most this."
DATA_HELP = (
    "Rows like the training data: pairs are fitted to the outputs on them, and the comparison "
    "reads them."
)
PORTABLE_HELP = "Write one rank for all modules and scale 1, as vLLM needs it."
DTYPE_HELP = "Dtype of the result: float32, float16, bfloat16; base (merged), q8_0 (gguf-merged)."


def command(
    to: Annotated[str, typer.Option("--to", help=TO_HELP)],
    out: Annotated[str, typer.Option("--out", "-o", help="A new directory.")],
    adapter: AdapterArgument = None,
    adapter_option: AdapterOption = None,
    model: OptionalModel = None,
    rank: Annotated[int | None, typer.Option(help=RANK_HELP)] = None,
    error: Annotated[float | None, typer.Option(help=ERROR_HELP)] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help=DATA_HELP)] = None,
    portable: Annotated[bool, typer.Option("--portable", help=PORTABLE_HELP)] = False,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    verify: Verify = True,
    max_kl: MaxKL = None,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Write an adapter for other programs, and compare the result with the trained model.

    The result is plain LoRA, a merged model, or either as GGUF. If it does not compute what the
    trained model computes, nothing is kept.
    """
    from lorakin.serving.job import ExportRequest

    request = ExportRequest(
        adapter=chosen_adapter(adapter, adapter_option), to=to, out=out, model=model, dtype=dtype,
        rank=rank, error=error, portable=portable, data=data, max_kl=max_kl, verify=verify,
        other_base=other_base,
    )  # fmt: skip
    run(request, as_json)


def run(request: ExportRequest, as_json: bool) -> None:
    """Exports an adapter, and prints what was written and how near it is to the trained model."""
    from lorakin.errors import ModelError, VerificationError
    from lorakin.serving.export import export

    try:
        exported = export(request)
    except VerificationError as error:
        if as_json:
            with contextlib.suppress(ModelError):  # if the report holds NaN, the error says more
                print_json(dict(error.report))
        raise
    if as_json:
        print_json(exported.as_dict())
        return
    console = console_for(False)
    for line in exported.lines():
        console.print(line)
