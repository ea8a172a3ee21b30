"""Text on a terminal: what comes from outside is shown as it is written, and never obeyed.

A label, a prompt, a tensor's key or a path may hold ANSI escapes, control characters, marks that
turn the direction of writing, or rich's own markup. On a `Terminal` no string is markup, and every
character that a terminal would obey stands as its escape. lorakin's own styles are rich's `Text`.
"""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, JustifyMethod, OverflowMethod, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

LONGEST = 1200
"""Characters of a message on the terminal."""
JOINERS = "\u200c\u200d"
"""Formatting characters that letters and emoji need, and that move nothing."""


def visible(text: str) -> str:
    r"""Returns a text whose control characters stand as their escapes; ends of lines and tabs stay.

    >>> visible("red \x1b[31m")
    'red \\x1b[31m'

    Those are controls (C0, C1), formatting characters such as those that turn the direction of
    writing, separators of lines, and halves of surrogate pairs, which cannot be written at all.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def _visible(letter: str) -> str:
    obeyed = (
        unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        and letter not in "\n\t" + JOINERS
    )
    return letter.encode("unicode_escape").decode("ascii") if obeyed else letter


def shortened(text: str) -> str:
    """Returns a message with its middle left out, if it is too long to be read."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"


def quoted(text: object) -> str:
    r"""Returns one word of a command for the shell, whatever it holds.

    >>> quoted("my file.txt")
    "'my file.txt'"

    A character that a terminal would obey is written as `$'\\x1b'`.
    """
    word = str(text)
    if visible(word) == word and "\n" not in word and "\t" not in word:
        return shlex.quote(word)
    word = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t")
    return f"$'{visible(word)}'"


def command(*words: object) -> str:
    """Returns a command to copy, its words quoted for the shell.

    >>> command("lorakin", "train", "--out", "my run")
    "lorakin train --out 'my run'"
    """
    return " ".join(map(quoted, words))


class Terminal(Console):
    """A console on which strings are no markup, and control characters are shown.

    Args:
        for_warnings: another console, for warnings, where this one may be quiet.
        more: as for rich's Console.
    """

    def __init__(self, *, for_warnings: Console | None = None, **more: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **more)
        self.for_warnings: Console = for_warnings or self

    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        emoji: bool | None = None,
        markup: bool | None = None,
        highlight: bool | None = None,
        highlighter: Any = None,
    ) -> Text:
        """Renders as rich does; the text is made visible before rich counts columns."""
        more: dict[str, Any] = {
            "style": style,
            "justify": justify,
            "overflow": overflow,
            "highlighter": highlighter,
        }
        return super().render_str(
            visible(text), emoji=emoji, markup=markup, highlight=highlight, **more
        )

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Renders as rich does; of control codes, only rich's own are left."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def labelled(label: str, text: object, style: str = "bold") -> Text:
    """Returns a styled label and plain text after it, for any console."""
    return Text.assemble((label, style), visible(str(text)))
