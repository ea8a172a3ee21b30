"""The command `lorakin doctor`: what works here, what is missing, and a text for a bug report."""

from __future__ import annotations

from lorakin.cli.options import Json, console_for, examples, print_json
from lorakin.terminal import labelled
from lorakin.waiting import waiting

EXAMPLES = examples("lorakin doctor", "lorakin doctor --json > doctor.json")


def command(as_json: Json = False) -> None:
    """Show versions, devices and their speed, what works here and what is missing.

    Paste the text into a bug report: it holds no names of users and no private paths.
    """
    from lorakin.training.doctor import diagnose

    with waiting("looking"):
        found = diagnose()
    if as_json:
        print_json(found.as_dict())
        return
    console = console_for(False)
    for label, text in found.lines():
        console.print(labelled(f"{label:<13} ", text))
