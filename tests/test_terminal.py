"""Text from outside on a terminal: shown, never obeyed; commands to copy mean for the shell what
they say.
"""

from __future__ import annotations

import ast
import io
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

import lorakin
from lorakin.terminal import Terminal, command, labelled, quoted, visible

HOSTILE = (
    "[/x] [bold]b[/] \x1b[2J\x1b]0;title\x07 \x9b31m \u202egpj \ud800 \r\b \u2028 "
    ":smile: [link=file:///]l[/link] \x7f"
)


def is_safe(text: str) -> bool:
    """No character that a terminal obeys, and none that cannot be written."""
    return not {unicodedata.category(c) for c in text if c not in "\n\t\u200c\u200d"} & {
        "Cc",
        "Cf",
        "Cs",
        "Zl",
        "Zp",
    }


def printed(thing: Any, kind: type[Console] = Terminal) -> str:
    file = io.StringIO()
    kind(file=file, width=400).print(thing)
    return file.getvalue()


def test_visible() -> None:
    assert visible("a\x1b[31m\u202e\x9b\ud800\x00\r") == r"a\x1b[31m\u202e\x9b\ud800\x00\r"
    for kept in ("plain", "naïve ⟦ ⟧ 💥", "two\nlines\tand a tab", "👩\u200d🚀 نویسه\u200cها"):
        assert visible(kept) == kept
    assert is_safe(visible("".join(map(chr, range(0x3000))) + "\ufeff\U000e0041"))


def test_whatever_is_printed_is_shown_as_it_is() -> None:
    table = Table(HOSTILE, title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE, Text(HOSTILE))
    for thing in (HOSTILE, Text(HOSTILE), labelled("label ", HOSTILE), table, [HOSTILE]):
        said = printed(thing)
        assert is_safe(said), thing
        assert "[/x]" in said
        assert ":smile:" in said
        assert r"\x1b" in said
    assert printed(labelled("label ", HOSTILE), Console) == f"label {visible(HOSTILE)}\n", (
        "on a console of rich's, too"
    )


def test_styles_of_ours_are_still_obeyed() -> None:
    file = io.StringIO()
    Terminal(file=file, force_terminal=True, color_system="standard").print(
        labelled("label", HOSTILE)
    )
    assert file.getvalue().startswith("\x1b[1mlabel\x1b[0m[/x]")
    assert file.getvalue().count("\x1b") == 2


@pytest.mark.parametrize(
    "word",
    [
        "plain",
        "a b",
        "it's",
        "$(touch x)",
        "`id`",
        "; rm -rf /",
        "-x",
        "",
        "\\",
        "a\\b c",
        "*",
        "~",
    ],
)
@pytest.mark.parametrize("more", ["", "\n", "\x1b", "\t'\\", "\u202e"])
def test_a_shell_reads_a_quoted_word_as_it_is(word: str, more: str) -> None:
    word += more
    assert is_safe(quoted(word))
    assert "\n" not in quoted(word)
    said = subprocess.run(
        ["bash", "-c", f"printf %s {command(word, 2)}"], capture_output=True, check=True
    ).stdout
    assert said.decode() == word + "2"


def test_nothing_else_prints_to_a_console_of_its_own() -> None:
    """No console but a `Terminal` is made, and no markup is written into what is printed."""
    source = Path(lorakin.__file__).parent
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                assert name not in ("Console", "from_markup"), f"{path}:{node.lineno}"
                printed = name in ("print", "add_row", "add_column") and ast.unparse(node)
                assert not printed or "[/" not in printed, (
                    f"{path}:{node.lineno} prints markup; use lorakin.terminal.labelled"
                )
