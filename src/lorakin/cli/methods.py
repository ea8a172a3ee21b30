"""The command `lorakin methods`: shows the members, their settings, and which combine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from lorakin.cli.options import Json, console_for, examples, print_json

if TYPE_CHECKING:
    from lorakin.family import Member

EXAMPLES = examples("lorakin methods", "lorakin methods --json")


def command(as_json: Json = False) -> None:
    """Show the members, their settings, and which combine."""
    from lorakin.family import Method, members, refusal_of_members

    family = members()
    if as_json:
        print_json(
            {"members": [_described(member) for member in family], "refused": _refused(family)}
        )
        return
    console = console_for(False)
    for member in family:
        console.print(Text.assemble((member.word, "bold"), "  ", (member.paper, "dim")))
        for axis, choice in member.decides.items():
            console.print(f"    {axis}: {choice}")
        settings = ", ".join(
            f"{name}={value}" for name, value in _described(member)["settings"].items()
        )
        rate = Method.of(member()).learning_rate
        console.print(f"    settings: {settings}; usual learning rate {rate:g}")
        if member.remark:
            console.print(f"    {member.remark}")
    numbers = [str(number) for number in range(1, len(family) + 1)]
    table = Table(
        "", *numbers, box=SIMPLE, title="which combine: --method A,B", padding=(0, 1, 0, 0)
    )
    reasons: list[str] = []
    for row in family:
        cells = []
        for column in family:
            reason = (
                None
                if row is column
                else refusal_of_members(*sorted((row, column), key=family.index))
            )
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append(
                "·" if row is column else "✔" if reason is None else f"✗{reasons.index(reason) + 1}"
            )
        table.add_row(f"{len(table.rows) + 1} {row.word}", *cells)
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"✗{number} {reason}")
    console.print(
        "More than two combine if each two of them do; a reason says where it depends on a third."
    )


def _described(member: type[Member]) -> dict[str, Any]:
    from lorakin.family import Method, Modifier

    defaults = Method.of(member())
    # Settings of plain LoRA's pair that the member's default pair does not have.
    not_its_own = Modifier.setting_names() - defaults.parametrisation.setting_names()
    fields = [field for field in dataclasses.fields(member) if field.name not in not_its_own]  # type: ignore[arg-type]
    return {
        "word": member.word,
        "paper": member.paper,
        "decides": dict(member.decides),
        "settings": {field.name: defaults.setting(field.name) for field in fields},
        "learning_rate": defaults.learning_rate,
        "remark": member.remark,
    }


def _refused(family: Sequence[type[Member]]) -> list[dict[str, str]]:
    from lorakin.family import refusal_of_members

    pairs = [(one, other) for n, one in enumerate(family) for other in family[n + 1 :]]
    refusals = [(one, other, refusal_of_members(one, other)) for one, other in pairs]
    return [
        {"one": one.word, "other": other.word, "reason": reason}
        for one, other, reason in refusals
        if reason is not None
    ]
