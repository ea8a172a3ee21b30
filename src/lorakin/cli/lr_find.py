"""The command `lorakin lr-find`: suggests a learning rate for a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakin.cli.options import Json, console_for, examples, print_json
from lorakin.cli.recipe_options import recipe_options
from lorakin.cli.verbosity import messages_on
from lorakin.terminal import labelled
from lorakin.training.recipe_option import DATA, DEVICES, METHOD
from lorakin.training.recipe_words import ALL_FIELDS, PANEL_OF

EXAMPLES = examples(
    "lorakin lr-find --model smollm2 --data rows.jsonl",
    "lorakin lr-find --model smollm2 --data rows.jsonl --method dora,lora+ --steps 100",
    "lorakin lr-find recipe.yaml --picture rates.png",
)
FIELDS = (
    *(name for name in ALL_FIELDS if PANEL_OF[name] in (DATA, METHOD, DEVICES)),
    "batch_size",
    "accumulate",
    "weight_decay",
    "max_grad_norm",
    "neftune_alpha",
    "label_smoothing",
    "seed",
)


@recipe_options(*FIELDS, grouped=True)
def command(
    recipe: Annotated[
        Path | None, typer.Argument(help="A YAML recipe; flags win over it.", show_default=False)
    ] = None,
    *,
    steps: Annotated[int, typer.Option("--steps", help="Steps of the test.")] = 60,
    lowest: Annotated[float, typer.Option("--from", help="The rate of the first step.")] = 1e-6,
    highest: Annotated[float, typer.Option("--to", help="The rate of the last step.")] = 1.0,
    picture: Annotated[
        Path, typer.Option("--picture", help="Where to draw the loss over the rates.")
    ] = Path("lr.png"),
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Suggest a learning rate, by a short run whose rate grows from step to step.

    It trains a fresh adapter on your data, with your method and batch size, and throws it away.
    Only a picture of the loss over the rates is left.
    """
    from lorakin.training.lr_range import find_rate
    from lorakin.training.recipe_file import read_recipe

    effective = read_recipe(recipe, flags | {"out": "unused", "steps": steps})
    found = find_rate(effective, messages_on(as_json), steps, lowest, highest)
    found.plot(picture)
    if as_json:
        print_json(found.as_dict())
        return
    console = console_for(False)
    suggestion = f"--lr {found.suggestion:.1e}, where the loss falls fastest"
    console.print(labelled("suggestion  ", suggestion))
    console.print(labelled("lowest loss ", f"at {found.lowest:.1e}; {picture}"))
