"""A tokenizer's chat template: conversations as text, the prompts that generation sends, and how turns end."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lorakin.errors import DataError, ModelError
from lorakin.training.bounded import Unbounded, bounded

ALPACA = """{{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '\\n\\n### Response:\\n' + message.content + eos_token }}
    {%- else %}
        {{- '\\n\\n### ' + ('System' if message.role == 'system' else 'Instruction') + ':\\n' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\n### Response:\\n' }}
{%- endif %}"""
"""For instructions and a model that has no template of its own: the prompt of Stanford's Alpaca."""

TODAY = re.compile(r"""strftime_now\(\s*(["'])(?P<form>(?:(?!\1).)*)\1\s*\)""")
CONTROL = re.compile(r"<\|\S+\|>")
"""A token that ends or opens turns, also where it was added as no special one."""
ASKED, REPLIED, AGAIN, THOUGHT = (
    "lorakinasks",
    "lorakinreplies",
    "lorakinasksagain",
    "lorakinthinks",
)
"""Messages of a probe: words that no template holds."""


@dataclasses.dataclass(frozen=True)
class Endings:
    """What a template writes after an answer, up to and with the token that ends the turn.

    Attributes:
        last: after the last answer of a conversation.
        inner: after one that others follow.
        before: what it writes between the opening of an answer and its first character, often nothing.
    """

    last: str
    inner: str
    before: str

    def tokens(self, split: re.Pattern[str]) -> list[str]:
        """The tokens that end a turn, that of the last answer first; `split` matches special tokens."""
        found = [split.findall(ending) for ending in (self.last, self.inner)]
        return list(dict.fromkeys(tokens[-1] for tokens in found if tokens))


class Template:
    """A tokenizer's chat template, for making token ids and labels of conversations.

    Args:
        tokenizer: of transformers, with a chat template.
        day: the day that a template prints, where it prints one; by default today.
    """

    def __init__(self, tokenizer: Any, day: datetime.date | None = None) -> None:
        self.tokenizer = tokenizer
        self.day = day or datetime.date.today()

    def text(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, answer_next: bool = False
    ) -> str:
        """The conversation as the template writes it, perhaps with the opening of an answer after it.

        Raises:
            DataError: the template does not take such a conversation.
            Unbounded: it does not end, or fills the memory.
        """
        turns = [
            _with_parts(message) if self.takes_parts else dict(message) for message in messages
        ]
        source = self.source(tools)

        def written(turns: list[dict[str, Any]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                turns,
                tools=tools,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=answer_next,
            )
            return text

        try:
            with bounded("the chat template"):
                return written(turns)
        except Unbounded:
            raise
        except Exception as error:  # a chat template raises whatever it likes about a conversation
            if any("tool_calls" in turn for turn in turns):
                with (
                    contextlib.suppress(Exception),
                    bounded("the chat template"),
                ):  # some take the arguments of calls as JSON text alone
                    return written([_with_json_arguments(turn) for turn in turns])
            raise DataError(
                f"the chat template does not take it: {str(error) or type(error).__name__}"
            ) from error

    def source(self, tools: Any = None) -> str:
        """The template, the day written out where it asks for it.

        Raises:
            ModelError: it is no text.
        """
        return TODAY.sub(
            lambda call: json.dumps(self.day.strftime(call["form"]), ensure_ascii=False),
            self._given(tools),
        )

    def _given(self, tools: Any = None) -> str:
        try:
            found: Any = self.tokenizer.get_chat_template(None, tools)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"the tokenizer's chat template cannot be used: {error}") from None
        if not isinstance(found, str):
            raise ModelError(
                f"the tokenizer's chat template is {str(found)[:80]!r}, expected a text"
            )
        return found

    @property
    def prints_the_day(self) -> bool:
        """Whether it asks what day it is."""
        return TODAY.search(self._given()) is not None

    @cached_property
    def specials(self) -> re.Pattern[str]:
        """Matches the tokenizer's special tokens in a text."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        words = {
            token.content for token in added if token.special or CONTROL.fullmatch(token.content)
        }
        words |= set(self.tokenizer.all_special_tokens)
        return re.compile(
            "|".join(map(re.escape, sorted(filter(str.strip, words), key=len, reverse=True)))
            or "(?!)"
        )

    @cached_property
    def special_ids(self) -> set[int]:
        """The ids of the tokenizer's special tokens, at which it cuts every text."""
        return {*self.tokenizer.all_special_ids, *self._added()}

    def _added(self) -> dict[int, Any]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {number: token for number, token in added.items() if token.special}

    @cached_property
    def takes_parts(self) -> bool:
        """Whether it reads content as a list of parts alone, as templates of models that see pictures do."""
        self.__dict__["takes_parts"] = False
        with contextlib.suppress(DataError):
            if ASKED in self.text([{"role": "user", "content": ASKED}]):
                return False
        self.__dict__["takes_parts"] = True
        with contextlib.suppress(DataError):
            return ASKED in self.text([{"role": "user", "content": ASKED}])
        return False

    @cached_property
    def reads_thoughts(self) -> bool:
        """Whether it writes a message's `reasoning_content`, so that <think>…</think> in the content is better there."""
        thought = {"role": "assistant", "content": REPLIED, "reasoning_content": THOUGHT}
        with contextlib.suppress(DataError):
            return THOUGHT in self.text([{"role": "user", "content": ASKED}, thought])
        return False

    @cached_property
    def opening(self) -> str:
        """What it writes between a question and its answer; nothing if it takes no plain question."""
        with contextlib.suppress(DataError):
            return self.text([{"role": "user", "content": ASKED}], answer_next=True).partition(
                ASKED
            )[2]
        return ""

    @cached_property
    def endings(self) -> Endings:
        """What it writes after an answer, found by rendering a probe."""
        return endings_of(self)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The tokens that generation sends for an answer to these messages."""
        return self.ids(self.text(messages, tools, answer_next=True))

    def ids(self, text: str) -> list[int]:
        """The tokens of a text that the template wrote, so that no BOS token is added."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


def endings_of(template: Template) -> Endings:
    """What the template writes after answers; see `Endings`.

    A probe of a question and an answer shows what follows the last one, a second question what follows an inner one:
    first what is the same in both, then the opening of a question, as it stands before the first one too.
    """
    split, eos = template.specials, template.tokenizer.eos_token or ""
    asked, replied, again = (
        {"role": role, "content": content}
        for role, content in (("user", ASKED), ("assistant", REPLIED), ("user", AGAIN))
    )
    try:
        opening = template.text([asked], answer_next=True)
        short = template.text([asked, replied])
    except DataError:  # it takes no plain exchange
        return Endings(eos, eos, "")
    between = ""
    with contextlib.suppress(DataError):  # some take one exchange only
        between = template.text([asked, replied, again]).partition(REPLIED)[2].partition(AGAIN)[0]
    before = short[len(opening) :].partition(REPLIED)[0] if short.startswith(opening) else ""
    last, inner = _pieces(split, short.partition(REPLIED)[2]), _pieces(split, between)
    question = _pieces(split, opening.partition(ASKED)[0])
    same = _to_special(split, last[: _shared(last, inner)])
    if same:
        return Endings(same, same, before)
    closing = _to_special(split, inner[: len(inner) - _shared(inner[::-1], question[::-1])])
    closing = closing or "".join(
        inner[: 1 + next((n for n, piece in enumerate(inner) if split.fullmatch(piece)), -1)]
    )
    return Endings(_to_special(split, last) or closing or eos, closing or eos, before)


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many pieces two lists begin with alike."""
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def _to_special(split: re.Pattern[str], pieces: Sequence[str]) -> str:
    """The pieces up to the last special token among them; nothing if there is none."""
    last = max((n for n, piece in enumerate(pieces) if split.fullmatch(piece)), default=-1)
    return "".join(pieces[: last + 1])


def _with_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_json_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else dict(message)


def _pieces(split: re.Pattern[str], text: str) -> list[str]:
    """The special tokens of a text, and what stands between them."""
    found, at = [], 0
    for token in split.finditer(text):
        found += [text[at : token.start()], token.group()]
        at = token.end()
    return [piece for piece in (*found, text[at:]) if piece]
