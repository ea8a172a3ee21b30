"""The command `lorakin serve`: starts an existing engine with adapters."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from lorakin.cli.options import (
    Json,
    OptionalModel,
    OtherBase,
    Verify,
    console_for,
    examples,
    print_json,
)
from lorakin.terminal import Terminal, labelled

if TYPE_CHECKING:
    from lorakin.serving.serve import Served

EXAMPLES = examples(
    "lorakin serve adapter --out served",
    "lorakin serve french legal --engine vllm --out served --port 8080",
    "lorakin serve adapter --engine llama.cpp --dtype q8_0 --out served",
    "lorakin serve adapter --engine vllm --out served --dry-run",
)

ADAPTERS_HELP = "Adapters' directories or hub ids, all of one base; also as --adapter."
ENGINE_HELP = (
    "vllm, sglang, tgi, llama.cpp, ollama or transformers; by default the first that is installed "
    "and can serve them."
)
OUT_HELP = "A directory for what the engine reads; what is there and still fresh is kept."
DTYPE_HELP = (
    "Dtype of a merged model, or of a GGUF base: float32, float16, bfloat16, q8_0 (GGUF); by "
    "default as lorakin export writes it, and a base that is a .gguf file as it is."
)
ARGS_HELP = 'More options of the engine, in one text: "--max-model-len 4096".'


def command(
    out: Annotated[str, typer.Option("--out", "-o", help=OUT_HELP)],
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="ADAPTER...", help=ADAPTERS_HELP)
    ] = None,
    adapter_option: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="The same as ADAPTER.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help=ENGINE_HELP)] = None,
    model: OptionalModel = None,
    host: Annotated[str, typer.Option(help="Where the server listens.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="By default the engine's.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    engine_args: Annotated[str, typer.Option("--engine-args", help=ARGS_HELP)] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Export, and print the command.")
    ] = False,
    verify: Verify = True,
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Serve adapters with vLLM, SGLang, TGI, llama.cpp, Ollama or transformers.

    What the engine needs is exported and compared with the trained model; its command is printed,
    and written as serve.sh; then it runs in the foreground. What each engine can serve of these
    adapters, and why not, is printed before.
    """
    from lorakin.errors import SettingError
    from lorakin.serving.serve import ServeRequest, prepare
    from lorakin.serving.start import run

    given = [*(adapters or []), *(adapter_option or [])]
    if not given:
        raise SettingError("ADAPTER is missing; give an adapter's directory or hub id")
    served = prepare(
        ServeRequest(
            given, out, engine, model, host, port, dtype, engine_args, verify, other_base, dry_run
        )
    )
    if as_json:
        print_json(served.as_dict())
    else:
        _show(served, console_for(False))
    if not dry_run:
        raise typer.Exit(run(served))


def _show(served: Served, console: Terminal) -> None:
    lines: dict[tuple[str, str], list[str]] = {}
    for row in served.rows:
        several = ", several in one server" if row["several"] else ""
        reasons = row["reasons"]
        why = f" ({'; '.join(reasons)})" if isinstance(reasons, list) and reasons else ""
        how = {"adapter": "beside the base", "merged": "merged"}.get(str(row["served"]), "no")
        line = str(row["engine"]), f"{how}{several}{why}"
        lines.setdefault(line, []).append(str(row["adapter"]))
    for (engine, said), names in lines.items():
        console.print(labelled(f"{engine:<13} ", f"{', '.join(names)}: {said}"))
    console.print(labelled(f"{'ask':<13} ", served.engine.asking(served.launch)))
    environment = [f"{key}={value}" for key, value in served.environment.items()]
    words = " ".join([*environment, shlex.join(served.command)])
    console.print(f"cd {shlex.quote(str(served.out))} && {words}", soft_wrap=True)
    for after in served.afterwards:
        console.print(shlex.join(after), soft_wrap=True)
