"""A tokenizer's chat template: conversations as text, generation's prompts, how turns end."""

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

ALPACA = (
    "{{- 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.' }}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n"
    "        {{- '\\n\\n### Response:\\n' + message.content + eos_token }}\n"
    "    {%- else %}\n"
    "        {{- '\\n\\n### ' + ('System' if message.role == 'system' else 'Instruction') + "
    "':\\n' + message.content }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '\\n\\n### Response:\\n' }}\n"
    "{%- endif %}"
)
"""The prompt of Stanford's Alpaca, for instructions and a model without a template of its own."""

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
    """What a template writes after an answer, up to the token that ends the turn and with it.

    Attributes:
        last: after the last answer of a conversation.
        inner: after one that others follow.
        before: between the generation prompt and an answer's first character, often nothing.
    """

    last: str
    inner: str
    before: str

    def tokens(self, split: re.Pattern[str]) -> list[str]:
        """Returns the tokens that end a turn, first the one after a last answer.

        Args:
            split: matches special tokens.
        """
        tokens_of = [split.findall(ending) for ending in (self.last, self.inner)]
        return list(dict.fromkeys(tokens[-1] for tokens in tokens_of if tokens))


class Template:
    """A tokenizer's chat template, for making token ids and labels of conversations.

    Args:
        tokenizer: of transformers, with a chat template.
        day: the day that a template prints, where it prints one; by default today.
    """

    def __init__(self, tokenizer: Any, day: datetime.date | None = None) -> None:
        self.tokenizer = tokenizer
        self.day = day or datetime.date.today()
        self._probes: dict[int, str | None] = {}

    def text(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, answer_next: bool = False
    ) -> str:
        """Returns a conversation as the template writes it.

        Args:
            messages: each with a role and content.
            tools: JSON schemas of functions that may be called.
            answer_next: whether the generation prompt follows.

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
                # Some templates take the arguments of calls only as JSON text.
                with contextlib.suppress(Exception), bounded("the chat template"):
                    return written([_with_json_arguments(turn) for turn in turns])
            raise DataError(
                f"the chat template does not take it: {str(error) or type(error).__name__}"
            ) from error

    def source(self, tools: Any = None) -> str:
        """Returns the template, with the day written out where it asks for it.

        Raises:
            ModelError: it is not text.
        """
        return TODAY.sub(
            lambda call: json.dumps(self.day.strftime(call["form"]), ensure_ascii=False),
            self._given(tools),
        )

    def _given(self, tools: Any = None) -> str:
        try:
            source: Any = self.tokenizer.get_chat_template(None, tools)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"the tokenizer's chat template cannot be used: {error}") from None
        if not isinstance(source, str):
            raise ModelError(
                f"the tokenizer's chat template is {str(source)[:80]!r}, expected a text"
            )
        return source

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
        """Whether it reads content only as a list of parts, as templates for pictures do."""
        # `text` reads this property, so it has a value while it is found out.
        self.__dict__["takes_parts"] = False
        with contextlib.suppress(DataError):
            if ASKED in self.text(_exchange(1)):
                return False
        self.__dict__["takes_parts"] = True
        with contextlib.suppress(DataError):
            return ASKED in self.text(_exchange(1))
        return False

    @cached_property
    def reads_thoughts(self) -> bool:
        """Whether it writes a message's `reasoning_content`.

        Then <think>…</think> is better there than in the content.
        """
        asked, replied = _exchange(2)
        with contextlib.suppress(DataError):
            return THOUGHT in self.text([asked, {**replied, "reasoning_content": THOUGHT}])
        return False

    def probe(self, turns: int) -> str | None:
        """Returns how it writes the first turns of a short exchange, rendered once.

        With one turn, the generation prompt follows. None if it does not take the exchange.

        Args:
            turns: 1, the question; 2, the answer too; 3, a second question too.
        """
        if turns not in self._probes:
            text = None
            with contextlib.suppress(DataError):
                text = self.text(_exchange(turns), answer_next=turns == 1)
            self._probes[turns] = text
        return self._probes[turns]

    @cached_property
    def opening(self) -> str:
        """What it writes between a question and its answer; nothing if it takes no question."""
        return (self.probe(1) or "").partition(ASKED)[2]

    @cached_property
    def endings(self) -> Endings:
        """What it writes after an answer."""
        return endings_of(self)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """Returns the tokens that generation sends for an answer to these messages."""
        return self.ids(self.text(messages, tools, answer_next=True))

    def ids(self, text: str) -> list[int]:
        """Returns the tokens of a text that the template wrote; no BOS token is added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def endings_of(template: Template) -> Endings:
    """Returns what the template writes after answers.

    A short exchange shows what follows a last answer, and one with a second question what follows
    an inner one: first what both have in common, then the opening of a question, which stands
    before the first question too.
    """
    split, eos = template.specials, template.tokenizer.eos_token or ""
    opening, answered = template.probe(1), template.probe(2)
    if opening is None or answered is None:
        return Endings(eos, eos, "")
    between = (template.probe(3) or "").partition(REPLIED)[2].partition(AGAIN)[0]
    before = ""
    if answered.startswith(opening):
        before = answered[len(opening) :].partition(REPLIED)[0]
    last, inner = _pieces(split, answered.partition(REPLIED)[2]), _pieces(split, between)
    question = _pieces(split, opening.partition(ASKED)[0])
    same = _to_special(split, last[: _shared(last, inner)])
    if same:
        return Endings(same, same, before)
    closing = _to_special(split, inner[: len(inner) - _shared(inner[::-1], question[::-1])])
    if not closing:
        first = next((n for n, piece in enumerate(inner) if split.fullmatch(piece)), -1)
        closing = "".join(inner[: first + 1])
    return Endings(_to_special(split, last) or closing or eos, closing or eos, before)


def _exchange(turns: int) -> list[dict[str, str]]:
    """Returns the first turns of a question, an answer and a second question."""
    texts = (("user", ASKED), ("assistant", REPLIED), ("user", AGAIN))
    return [{"role": role, "content": content} for role, content in texts[:turns]]


def _shared(first: Sequence[str], second: Sequence[str]) -> int:
    """Returns how many pieces two lists begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _to_special(split: re.Pattern[str], pieces: Sequence[str]) -> str:
    """Returns the pieces up to the last special token; nothing if there is none."""
    last = max((n for n, piece in enumerate(pieces) if split.fullmatch(piece)), default=-1)
    return "".join(pieces[: last + 1])


def _with_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_json_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message whose calls have their arguments as JSON text."""

    def packed(call: Mapping[str, Any]) -> dict[str, Any]:
        inner = call["function"]
        text = json.dumps(inner["arguments"], ensure_ascii=False)
        return {**call, "function": {**inner, "arguments": text}}

    calls = [packed(call) for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls} if calls else dict(message)


def _pieces(split: re.Pattern[str], text: str) -> list[str]:
    """Returns the special tokens of a text, and what stands between them."""
    pieces, end_before = [], 0
    for token in split.finditer(text):
        pieces += [text[end_before : token.start()], token.group()]
        end_before = token.end()
    return [piece for piece in (*pieces, text[end_before:]) if piece]
