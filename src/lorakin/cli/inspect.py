"""The command `lorakin inspect`: shows what an adapter is, and how much it changes each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from lorakin.cli.options import ADAPTER_HELP, Json, console_for, examples, print_json
from lorakin.terminal import labelled
from lorakin.waiting import waiting

EXAMPLES = examples(
    "lorakin inspect adapter",
    "lorakin inspect adapter --html adapter.html",
    "lorakin inspect adapter --json",
)


def command(
    adapter: Annotated[
        str,
        typer.Argument(metavar="ADAPTER", help=ADAPTER_HELP),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Also write a page to this file, with pictures and the ranks that suffice.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what an adapter is, and how much it changes each layer.

    That is: members, rank, targets, sizes, base, and the norm of the change by layer and module.
    """
    from lorakin.storage.hub import adapter_directory
    from lorakin.storage.summary import by_layer, summarise

    with waiting("measuring the change"):
        summary = summarise(adapter_directory(adapter))
    if html is not None:
        from lorakin.report import adapter_page, page

        with waiting("drawing the page"):
            page.write(html, adapter_page.render(summary))
        console_for(as_json).print(f"the page: {html}")
    if as_json:
        print_json(summary.as_dict())
        return
    console = console_for(False)
    for name, value in summary.headline().items():
        console.print(labelled(f"{name:<11} ", value))
    if not summary.norms:
        console.print(
            "no norms: the shared pair is not stored in the file; it is drawn again when the base "
            "is loaded"
        )
        return
    title = (
        "‖up·down‖ by layer and module, without the magnitudes"
        if summary.has_gain
        else "‖ΔW‖ by layer and module"
    )
    title += "; a parameter's experts together" if summary.has_experts else ""
    columns = summary.columns
    last = [name.rpartition(".")[2] for name in columns]
    titles = last if len(set(last)) == len(last) else columns
    table = Table("layer", title=title, padding=(0, 1, 0, 0), box=SIMPLE)
    for title in titles:
        table.add_column(title, justify="right", overflow="fold")
    for layer, norms in by_layer(summary.norms_by_stack).items():
        table.add_row(layer, *(f"{norms[c]:.3g}" if c in norms else "" for c in columns))
    console.print(table)
