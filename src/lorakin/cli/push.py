"""The command `lorakin push`: uploads an adapter, a merged model or GGUF files to the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from lorakin.cli.options import Json, console_for, examples, print_json

EXAMPLES = examples(
    "lorakin push adapter org/adapter",
    'lorakin push merged org/model --private --message "Second run"',
)

FOLDER_HELP = "The directory of an adapter, a merged model or GGUF files."
NAME_HELP = "The repository, made if it does not exist: org/name, or a name of yours."
PRIVATE_HELP = "Who may see a repository that is made now; by default the hub decides."


def command(
    folder: Annotated[str, typer.Argument(metavar="DIR", help=FOLDER_HELP)],
    name: Annotated[str, typer.Argument(metavar="NAME", help=NAME_HELP)],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help=PRIVATE_HELP, show_default=False)
    ] = None,
    message: Annotated[str | None, typer.Option(help="The message of the commit.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="The branch, made if it does not exist.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload an adapter, a merged model or GGUF files to the Hugging Face hub.

    An adapter goes up with its model card and recipe, without checkpoints. The files of an adapter
    that was there are replaced; a README.md that a person wrote there stays.
    """
    from lorakin.serving.push import push

    address = push(folder, name, private=private, message=message, revision=revision)
    if as_json:
        print_json({"url": address})
    else:
        console_for(False).print(address, soft_wrap=True)
