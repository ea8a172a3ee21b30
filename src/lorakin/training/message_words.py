"""What the messages of a conversation say, and where that stands in a template's text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

THOUGHTS = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)
WORDS = re.compile(r"\w+")
MOST_CHOICES = 1000
"""Of the places where the system's words could stand, as many are tried."""

Message = Mapping[str, Any]


def spoken_parts(message: Message, thoughts: bool = True) -> Iterator[str]:
    """Yields what a message says, in its order: its reasoning, its text, the names of its calls.

    >>> list(spoken_parts({"role": "assistant", "content": "<think>hm</think>Yes"}))
    ['hm', 'Yes']

    Args:
        message: with a role and content.
        thoughts: whether the reasoning counts.
    """
    content = message["content"]
    thought = THOUGHTS.fullmatch(content) if message["role"] == "assistant" else None
    parts = []
    if thoughts:
        parts = [message.get("reasoning_content", ""), thought["thought"] if thought else ""]
    parts.append(thought["answer"] if thought else content)
    yield from (part.strip() for part in parts if part.strip())
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]


def arguments(message: Message) -> Iterator[str]:
    """Yields the single values in the arguments of a message's calls, as text."""

    def leaves(value: Any) -> Iterator[str]:
        if isinstance(value, Mapping | list):
            for item in value.values() if isinstance(value, Mapping) else value:
                yield from leaves(item)
        else:
            yield value if isinstance(value, str) else json.dumps(value)

    for call in message.get("tool_calls", ()):
        yield from leaves(call["function"]["arguments"])


def with_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message with the <think>…</think> of its content as `reasoning_content`."""
    match = THOUGHTS.fullmatch(message["content"]) if message["role"] == "assistant" else None
    if match is None or message.get("reasoning_content") or not match["thought"].strip():
        return message
    return {
        **message,
        "reasoning_content": match["thought"].strip("\n"),
        "content": match["answer"].lstrip("\n"),
    }


def find_anywhere(words: str, text: str, start: int) -> tuple[int, int] | None:
    """Returns where a text has words from `start` on, as they are or as JSON writes them."""
    words = words.strip()
    for written in (words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1]):
        if (position := text.find(written, start)) >= 0:
            return position, position + len(written)
    return None


def find_words(
    words: str, text: str, start: int, taken: Sequence[tuple[int, int]] = ()
) -> tuple[int, int] | None:
    """Returns the first place from `start` on where words stand between word boundaries.

    >>> find_words("a", "channel a", 0)
    (8, 9)

    Args:
        words: what to look for.
        text: where.
        start: the first character that counts.
        taken: places that do not count.
    """
    while (place := find_anywhere(words, text, start)) is not None:
        edges = ((place[0] - 1, place[0]), (place[1] - 1, place[1]))
        is_in_a_word = any(
            a >= 0 and b < len(text) and WORDS.fullmatch(text[a]) and WORDS.fullmatch(text[b])
            for a, b in edges
        )
        if not is_in_a_word and not any(
            place[0] < end and begin < place[1] for begin, end in taken
        ):
            return place
        start = place[0] + 1
    return None


def occurs_in_pieces(part: str, text: str) -> bool:
    """Returns whether `text` has all words of a JSON text: templates rewrite tools' results."""
    return part.lstrip()[:1] in ("{", "[") and all(word in text for word in WORDS.findall(part))


def first_missing(
    parts: Sequence[tuple[int, str]],
    messages: Sequence[Message],
    text: str,
    taken: Sequence[tuple[int, int]] = (),
) -> tuple[int, str] | None:
    """Returns the first part that does not stand in a text after those before it, if there is one.

    Args:
        parts: each with its message's number.
        messages: the messages.
        text: where the parts should stand.
        taken: places that do not count.
    """
    position = 0
    for number, part in parts:
        place = find_words(part, text, position, taken)
        if place is not None:
            # The parts of a call stand in any order.
            position = place[0] if messages[number].get("tool_calls") else place[1]
        elif not occurs_in_pieces(part, text):
            return number, part
    return None


def placements(
    parts: Sequence[str], text: str, taken: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yields the choices of places for parts that may stand anywhere, but not on each other.

    >>> list(placements(["a", "b"], "a b a"))
    [((0, 1), (2, 3)), ((4, 5), (2, 3))]
    """
    if not parts:
        yield taken
        return
    first, *others = parts
    place = find_words(first, text, 0, taken)
    if place is None and occurs_in_pieces(first, text):
        yield from placements(others, text, taken)
    while place is not None:
        yield from placements(others, text, (*taken, place))
        place = find_words(first, text, place[0] + 1, taken)


def short(text: str) -> str:
    """Returns a text for a message, at most 60 characters of it."""
    return repr(text if len(text) <= 60 else text[:59] + "…")
