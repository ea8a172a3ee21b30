"""What a row says: a conversation, a text, or a text with its class; and its values as text."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import json
from collections.abc import Mapping
from typing import Any

from lorakin.errors import DataError

Values = Mapping[str, Any]
"""A row's columns by name."""


class Number(float):
    """A JSON number that is written as the file writes it.

    >>> str(Number("1.10"))
    '1.10'
    """

    def __new__(cls, literal: str) -> Number:
        number = super().__new__(cls, literal)
        number.literal = literal
        return number

    literal: str

    def __str__(self) -> str:
        return self.literal

    __repr__ = __str__


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages in the form that chat templates take, and the tools that they may call.

    Attributes:
        messages: each has a role and content, perhaps `tool_calls`, `reasoning_content`, `name`.
        learned: for each message whether it is learned; None leaves it to `--loss-on`.
        tools: JSON schemas of functions, or None.
        is_instruction: whether it is one instruction and its answer, as an Alpaca row is.
    """

    messages: list[dict[str, Any]]
    learned: list[bool | None]
    tools: list[Any] | None = None
    is_instruction: bool = False


@dataclasses.dataclass(frozen=True)
class PlainText:
    """A prompt and its answer, as plain text; the prompt may be empty.

    One that `is_raw` is the beginning of a text, and no message for a chat template.
    """

    prompt: str
    answer: str
    is_raw: bool = False


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text, perhaps a second one, and their label, as it stands in the data.

    A label is a class, a list of classes, or a number.
    """

    text: str
    label: Any
    second: str | None = None


@dataclasses.dataclass(frozen=True)
class Tagged:
    """Words, and the tag of each, as it stands in the data."""

    words: list[str]
    tags: list[Any]


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, each with the prompt: the better one and the other."""

    chosen: Conversation | PlainText
    rejected: Conversation | PlainText


@dataclasses.dataclass(frozen=True)
class Judged:
    """An answer with its prompt, and whether it is a good one."""

    answer: Conversation | PlainText
    is_good: bool


Content = Conversation | PlainText | Labelled | Tagged | Preference | Judged


def text_of(value: Any, what: str) -> str:
    """Returns a value as text, in the file's own characters.

    >>> text_of(Number("1.10"), "output")
    '1.10'
    >>> text_of([{"type": "text", "text": "Hello"}], "content")
    'Hello'

    Args:
        value: a text, a number, a date, or a list of parts that are texts.
        what: what an error calls it.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, bool):
        raise DataError(f"{what} is {short_json(value)}, expected text")
    if isinstance(value, int | float | decimal.Decimal | datetime.date | datetime.time):
        return str(value)
    if _is_parts(value):
        return "".join(_part(part, what) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{what} is {short_json(value)}, expected text")
    return value


def _is_parts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(part, Mapping) and "type" in part for part in value)
    )


def _part(part: Mapping[str, Any], what: str) -> str:
    if part["type"] != "text":
        raise DataError(
            f"{what} holds a part of type {short_json(part['type'])}; only text can be trained on"
        )
    return text_of(part.get("text", part.get("value")), what)


def label_text(value: Any) -> str:
    """Returns a class's name: text as it is, a whole number without a fraction, True, False.

    >>> label_text(3.0), label_text("positive")
    ('3', 'positive')
    """
    if isinstance(value, str):
        return value
    return str(value if isinstance(value, bool) else int(value))


def listed(value: Any, what: str) -> list[Any]:
    """Returns a list, which may be written as JSON text.

    >>> listed("[1, 2]", "answers")
    [1, 2]

    Raises:
        DataError: it is not a list; `what` is what the error calls it.
    """
    value = unpacked(value)
    if not isinstance(value, list):
        raise DataError(f"{what} is {short_json(value)}, expected a list")
    return value


def unpacked(value: Any) -> Any:
    """Returns the list or object that a JSON text holds; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value, parse_float=Number)
        except (ValueError, RecursionError):
            return value
    return value


def short_json(value: Any) -> str:
    """Returns a value for a message, at most 80 characters of it."""
    if isinstance(value, Number):
        return value.literal
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:79] + "…"
