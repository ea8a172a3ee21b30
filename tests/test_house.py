"""The house stays readable: sizes of files and functions, circles of imports, names (tools/house.py)."""

from __future__ import annotations

import re
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def figures() -> dict[str, object]:
    return house.figures(ROOT)


@pytest.mark.parametrize(
    "name",
    [
        "files above 350 lines",
        "functions above 60 lines",
        "circles of imports between files",
        "circles of imports between rooms",
    ],
)
def test_there_is_none(figures: dict[str, object], name: str) -> None:
    assert figures[name] == 0


def test_no_public_class_name_stands_twice(figures: dict[str, object]) -> None:
    assert figures["public class names that stand twice"] == []


def test_nobody_but_the_members_lists_their_slots() -> None:
    """Files and conversions take the names of a plain pair's slots from the members' declarations."""
    slots = re.compile(r"""\[["'](A|B|m|d|b|P|E|Q|R|up_K|down_K|up_0|down_0)["']\]""")
    source = ROOT / "src" / "lorakin"
    named = {
        str(path.relative_to(source)): sorted(set(slots.findall(path.read_text())))
        for path in source.rglob("*.py")
        if path.relative_to(source).parts[0] != "family"
    }
    assert {path: names for path, names in named.items() if names} == {}
