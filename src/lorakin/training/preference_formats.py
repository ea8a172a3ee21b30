"""Rows that say which of two answers is better, or whether one answer is good."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from lorakin.errors import DataError
from lorakin.training.contents import (
    Content,
    Conversation,
    Judged,
    PlainText,
    Preference,
    Values,
    listed,
    short_json,
    text_of,
)
from lorakin.training.messages import (
    ROLES,
    SAYS,
    SYSTEM,
    TOOLS,
    conversation,
    either,
    exchanges,
    turns_in,
    with_context,
)

PAIRED = (
    ("prompt", "chosen", "rejected"), ("instruction", "chosen", "rejected"),
    ("question", "chosen", "rejected"), ("query", "chosen", "rejected"),
    ("conversations", "chosen", "rejected"), ("messages", "chosen", "rejected"),
    ("prompt", "response", "rejected_response"), ("query", "response", "rejected_response"),
    ("prompt", "completion", "rejected_response"),
)  # fmt: skip
"""Columns of the prompt, the better answer and the other."""
WHOLE = (("messages", "rejected_messages"), ("chosen", "rejected"))
"""Columns of two answers that hold the prompt, too."""
ENDED = (("messages", "rejected_response"), ("conversations", "rejected_response"))
"""Columns of a conversation, and of another last answer."""
EXTRA = ("input", "context", *SYSTEM, "history", *TOOLS)
"""Columns that belong to a prompt."""
VERDICTS = ("label", "kto_tag")
"""Columns that say whether an answer is good."""
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
"""What begins a turn in a transcript, as Anthropic's HH-RLHF has them."""
WORD = re.compile(r"\s*\S+|\s+$")
"""A word with the space before it."""

Answered = Conversation | PlainText
Read = Callable[[Values], Content]


def paired(prompt: str, chosen: str, rejected: str) -> Read:
    """Returns the reader of rows with a prompt and two answers, which may repeat the prompt."""

    def read(row: Values) -> Preference:
        turns = [turns_in(row[key]) for key in (chosen, rejected)]
        if all(turns) and not any(_is_answer(side[0]) for side in turns if side):
            return _of_conversations(row, turns, (chosen, rejected))
        sides = [_answered(row, prompt, key) for key in (chosen, rejected)]
        return _checked(sides[0], sides[1], (chosen, rejected))

    return read


def whole(chosen: str, rejected: str) -> Read:
    """Returns the reader of rows whose two texts, or conversations, begin with the prompt."""

    def read(row: Values) -> Preference:
        keys, values = (chosen, rejected), (row[chosen], row[rejected])
        turns = [turns_in(value) or _transcript(value) for value in values]
        if all(turns):
            return _of_conversations(row, turns, keys)
        first, second = (text_of(value, key) for value, key in zip(values, keys, strict=True))
        prompt = _shared(first, second)
        sides = [PlainText(prompt, text[len(prompt) :], is_raw=True) for text in (first, second)]
        return _checked(sides[0], sides[1], keys)

    return read


def ended(turns: str, rejected: str) -> Read:
    """Returns the reader of rows with a conversation and another last answer."""

    def read(row: Values) -> Preference:
        given = listed(row[turns], turns)
        if not given or not _is_answer(given[-1]):
            raise DataError(f"{turns} does not end with an answer to set beside {rejected}")
        other = turns_in(row[rejected])
        other = other or [{"role": "assistant", "content": text_of(row[rejected], rejected)}]
        return _of_conversations(row, [given, [*given[:-1], *other]], (turns, rejected))

    return read


def judged(answer: Read, verdict: str) -> Read:
    """Returns the reader of rows with an answer, as `answer` reads it, and whether it is good."""

    def read(row: Values) -> Judged:
        content = answer(row)
        if isinstance(content, Conversation):
            # The last answer is judged, not those before it.
            last = len(content.messages) - 1
            flags = [flag if n == last else False for n, flag in enumerate(content.learned)]
            content = dataclasses.replace(content, learned=flags)
        if not isinstance(content, Conversation | PlainText) or not _said(content):
            raise DataError("the answer is empty")
        if (is_good := verdict_of(row[verdict])) is None:
            raise DataError(
                f"{verdict} is {short_json(row[verdict])}, expected true or false: whether the "
                "answer is good"
            )
        return Judged(content, is_good)

    return read


def verdict_of(value: Any) -> bool | None:
    """Returns what a value says of an answer; None if it is no verdict.

    >>> verdict_of("True"), verdict_of(0.0), verdict_of("sports")
    (True, False, None)
    """
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return SAYS.get(str(value).lower())


def is_verdict(value: Any) -> bool:
    """Returns whether a value says that an answer is good, or that it is not."""
    return verdict_of(value) is not None


def _is_answer(turn: Any) -> bool:
    word = either(turn, "role", "from")
    return isinstance(word, str) and ROLES.get(word.lower()) == "assistant"


def _answered(row: Values, prompt: str, key: str) -> Answered:
    """Returns the prompt in one column with the answer in another."""
    answer, asked = turns_in(row[key]), turns_in(row[prompt])
    if answer and not _is_answer(answer[0]):
        raise DataError(f"{key} begins with {short_json(answer[0])}, expected an answer")
    extra = [name for name in EXTRA[:2] if name != prompt]
    if asked is None and answer is None and not any(row.get(name) for name in EXTRA[2:]):
        return PlainText(with_context(row, prompt, tuple(extra)), text_of(row[key], key))
    answer = answer or [{"role": "assistant", "content": text_of(row[key], key)}]
    asked = asked or exchanges(row, with_context(row, prompt, tuple(extra)), "")[:-1]
    found = conversation([*asked, *answer], row)
    return _learned_from(found, len(found.messages) - len(answer))


def _of_conversations(row: Values, turns: Sequence[Any], keys: tuple[str, str]) -> Preference:
    """Returns two conversations that begin alike: their prompt is what they share."""
    sides = [conversation(side, row) for side in turns]
    first, second = (side.messages for side in sides)
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    if not any(message["role"] != "system" for message in first[:shared]):
        raise DataError(f"{keys[0]} and {keys[1]} do not begin with the same message, the prompt")
    chosen, rejected = (_learned_from(side, shared) for side in sides)
    return _checked(chosen, rejected, keys)


def _learned_from(found: Conversation, first: int) -> Conversation:
    """Returns a conversation of which no message before number `first` is learned."""
    flags = [False] * first + list(found.learned[first:])
    return dataclasses.replace(found, learned=flags)


def _checked(chosen: Answered, rejected: Answered, keys: tuple[str, str]) -> Preference:
    """Returns the pair.

    Raises:
        DataError: an empty preference: a side says nothing, or both say the same.
    """
    for side, key in zip((chosen, rejected), keys, strict=True):
        if not _said(side):
            raise DataError(f"an empty preference: {key} says nothing after the prompt")
    if chosen == rejected:
        raise DataError(
            f"an empty preference: {keys[0]} and {keys[1]} are the same; remove such rows"
        )
    return Preference(chosen, rejected)


def _said(side: Answered) -> bool:
    """Returns whether there is an answer."""
    if isinstance(side, PlainText):
        return bool(side.answer.strip())
    return any(
        message["role"] == "assistant" and (message["content"].strip() or "tool_calls" in message)
        for message, flag in zip(side.messages, side.learned, strict=True)
        if flag is not False
    )


def _transcript(text: Any) -> list[dict[str, str]] | None:
    r"""Returns the turns of a transcript; None if a text is none.

    >>> _transcript("\n\nHuman: Hi\n\nAssistant: Hello")
    [{'role': 'human', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    before, *parts = SPEAKER.split(text) if isinstance(text, str) else [""]
    if before.strip() or len(parts) < 4:
        return None
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": role.lower(), "content": said.strip()} for role, said in pairs]


def _shared(first: str, second: str) -> str:
    """Returns the whole words with which both texts begin.

    >>> _shared("the cat sat", "the cab ran")
    'the'
    """
    # The answer keeps the space before it, as tokenizers want it.
    pairs = zip(WORD.findall(first), WORD.findall(second), strict=False)
    return "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
