"""Which tokens of a conversation are learned: exactly the answers, each with the end of its turn.

A chat template turns messages into one text. An answer must follow what generation would send: the
same template over the messages before it, with the generation prompt. So an answer is learned
from where that prompt ends to the token that ends the turn. All of it is checked: the prompt is
there character by character and token by token, the answer's own words follow, and between them
is only what the template writes. A conversation that fails a check is refused.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lorakin.errors import DataError
from lorakin.training.contents import Conversation
from lorakin.training.message_words import (
    MOST_CHOICES,
    THOUGHTS,
    WORDS,
    Message,
    arguments,
    find_anywhere,
    find_words,
    first_missing,
    placements,
    short,
    spoken_parts,
    with_thoughts,
)
from lorakin.training.templates import Template
from lorakin.training.token_labels import IGNORED, Span, Unverified, continued, labelled

LAST, ANSWERS, ALL = "last", "answers", "all"
LOSS_ON = (LAST, ANSWERS, ALL)


class Answers:
    """Finds what is learned of conversations that a chat template writes."""

    def __init__(self, template: Template) -> None:
        self.template = template

    def encode(
        self, conversation: Conversation, loss_on: str = ANSWERS
    ) -> tuple[list[int], list[int]]:
        """Returns the token ids and labels of a conversation; other labels than answers' are -100.

        Args:
            conversation: its messages, and which of them are learned if the data says so.
            loss_on: "answers" (every turn of the assistant except a leading one), "last" (the
                last of them), or "all" (every token).

        Raises:
            Unverified: what would be learned is not exactly the answers with the ends of their
                turns, or the prompt of one is not what generation would send.
            DataError: the template does not take the conversation.
        """
        tools, messages = conversation.tools, list(conversation.messages)
        if not messages:
            return [], []
        learned = _learned(conversation, loss_on)
        if loss_on == ALL:
            text = self.template.text(messages, tools)
            self._check_all_spoken(messages, text, tools, _learned(conversation, ANSWERS))
            ids = self.template.ids(text)
            return ids, list(ids)
        if not learned:
            ids = self.template.ids(self.template.text(messages, tools))
            return ids, [IGNORED] * len(ids)

        # Nothing is learned of what follows the last of them.
        messages = messages[: learned[-1] + 1]
        prompts = {
            index: self.template.text(messages[:index], tools, answer_next=True)
            for index in learned
        }
        self._check_all_spoken(messages[: learned[-1]], prompts[learned[-1]], tools)
        for index in learned if self.template.reads_thoughts else ():
            messages[index] = with_thoughts(messages[index])
        text = self.template.text(messages, tools)
        try:
            spans = [self._span(messages, index, tools, prompts[index], text) for index in learned]
        except Unverified as reason:
            if len(learned) > 1:
                raise Unverified(
                    f"{reason}. Train on the last answer alone with --loss-on last, or give "
                    "another template with --chat-template FILE"
                ) from None
            return self._encode_last_answer(messages, prompts[learned[-1]], reason)
        return labelled(self.template, *self._with_last_ending(text, spans))

    def _span(
        self, messages: Sequence[Message], index: int, tools: Any, prompt: str, text: str
    ) -> Span:
        """Returns where in the whole text message `index` is learned, with the end of its turn."""
        message, number = messages[index], _answer_number(messages, index)
        if not text.startswith(prompt):
            raise Unverified(
                f"generation would send another prompt for answer {number} than the template "
                f"writes before it in the whole conversation: {_first_difference(prompt, text)}"
            )
        start = end = len(prompt)
        for words in spoken_parts(message):
            # Prefer a match at word boundaries, so that the answer "a" is not found inside the
            # template's "channel".
            place = find_words(words, text, end) or find_anywhere(words, text, end)
            if place is None:
                thought = words in message.get("reasoning_content", "")
                raise Unverified(
                    f"the template drops or changes what answer {number} says: {short(words)} is "
                    f"not in it{' (its reasoning_content)' if thought else ''}"
                )
            if foreign := self._foreign_word(text[end : place[0]], message):
                raise Unverified(f"the template puts {short(foreign)} into answer {number}")
            end = place[1]
        if message.get("tool_calls"):
            end = self._call_ends(messages, index, tools, text, end)
        else:
            end = self._turn_ends(messages, index, text, end)
        turn = text[:end]
        lost = [v for v in arguments(message) if find_anywhere(v, turn, start) is None]
        if lost:
            raise Unverified(
                f"the template drops what a call of answer {number} says: "
                f"{short(lost[0])} is not in it"
            )
        return start, end

    def _call_ends(
        self, messages: Sequence[Message], index: int, tools: Any, text: str, answer_end: int
    ) -> int:
        """Returns where a turn with calls ends, whose answer's words end at `answer_end`.

        That is where the template ends it when nothing follows, or after the next token.
        """
        number = _answer_number(messages, index)
        up_to_here = self.template.text(messages[: index + 1], tools).rstrip()
        if not text.startswith(up_to_here) or len(up_to_here) < answer_end:
            raise Unverified(
                f"the template writes the calls of answer {number} otherwise when others follow"
            )
        tokens = self.template.specials.finditer(text, answer_end)
        token = next((token for token in tokens if token.end() >= len(up_to_here)), None)
        end = len(up_to_here) if token is None else token.end()
        ending = "" if token is None else token.group()
        if text[len(up_to_here) : end].strip() not in ("", ending):
            raise Unverified(f"no token ends the turn of answer {number}")
        if foreign := self._foreign_word(text[answer_end:end], messages[index]):
            raise Unverified(f"the template puts {short(foreign)} into answer {number}")
        return end

    def _turn_ends(self, messages: Sequence[Message], index: int, text: str, end: int) -> int:
        """Returns where the turn ends whose answer's words end at `end`."""
        endings = self.template.endings.tokens(self.template.specials)
        tokens = list(self.template.specials.finditer(text, end))
        for token in (*(token for token in tokens if token.group() in endings), *tokens[:1]):
            if not self._foreign_word(text[end : token.start()], messages[index]):
                return token.end()
        rest = text[end:].rstrip()
        if index == len(messages) - 1 and not self._foreign_word(rest, messages[index]):
            return end + len(rest)
        raise Unverified(f"no token ends the turn of answer {_answer_number(messages, index)}")

    def _with_last_ending(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Ends the last answer as the template ends others, if it ends in no token."""
        start, end = spans[-1]
        if any(token.end() == end for token in self.template.specials.finditer(text, start, end)):
            return text, spans
        text = text[:end] + self.template.endings.last
        return text, [*spans[:-1], (start, len(text))]

    def _foreign_word(self, between: str, message: Message) -> str | None:
        """Returns a word that neither the template nor the message has; None if there is none."""
        as_json = (json.dumps(message), json.dumps(message, ensure_ascii=False))
        expected = set(self._words)
        for part in (*as_json, *spoken_parts(message)):
            expected.update(WORDS.findall(part))
        return next((word for word in WORDS.findall(between) if word not in expected), None)

    @cached_property
    def _words(self) -> set[str]:
        """The words of the template's source, also as they are once escapes are read."""
        source = self.template.source().encode().decode("unicode_escape", errors="ignore")
        return {*WORDS.findall(self.template.source()), *WORDS.findall(source)}

    def _encode_last_answer(
        self, messages: Sequence[Message], prompt: str, why: Unverified
    ) -> tuple[list[int], list[int]]:
        """Encodes the prompt that generation would send, and after it the last answer.

        For templates that write this answer otherwise in the whole conversation.
        """
        message, before = messages[-1], self.template.endings.before
        if message.get("tool_calls"):
            raise why
        answer, opened = message["content"], re.search(r"<think>\s*$", prompt)
        if message.get("reasoning_content"):
            if not opened:
                raise why
            answer = f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n{answer}"
        if opened:
            answer = self._within_thoughts(answer)
        before = "" if before.strip() and answer.startswith(before) else before
        ids, learned = self.template.ids(prompt), f"{before}{answer}{self.template.endings.last}"
        answered = continued(self.template.tokenizer, prompt, learned)
        return ids + answered, [IGNORED] * len(ids) + answered

    def _within_thoughts(self, answer: str) -> str:
        """Returns an answer without the <think> that generation's prompt already has.

        Raises:
            Unverified: it has no reasoning.
        """
        if not (inner := THOUGHTS.fullmatch(answer)):
            can_be_quiet = "enable_thinking" in self.template.source()
            quiet = "--template-arg enable_thinking=false, or " if can_be_quiet else ""
            raise Unverified(
                "generation opens the answer with <think>, and this one has no reasoning; give it "
                f"in the answer (<think>…</think>, which may be empty), or give {quiet}another "
                "template with --chat-template FILE"
            )
        return f"{inner['thought'].lstrip()}</think>{inner['answer']}"

    def _check_all_spoken(
        self, messages: Sequence[Message], prompt: str, tools: Any, learned: Sequence[int] = ()
    ) -> None:
        """Checks that what messages say stands in a text, one after another.

        The system's words may stand anywhere. Reasoning counts only in messages that are
        `learned`, since templates leave out that of others.

        Raises:
            DataError: the template drops a message, or the tools.
        """
        if tools and prompt == self._without_tools(messages):
            raise DataError(
                "the chat template does not write the row's tools; use a model whose template does"
            )
        parts = [
            (number, part)
            for number, message in enumerate(messages)
            for part in [*spoken_parts(message, thoughts=number in learned), *arguments(message)]
        ]
        system = [message["role"] in ("system", "developer") for message in messages]
        told = [one for one in parts if system[one[0]]]
        said = [one for one in parts if not system[one[0]]]
        lost = first_missing(said, messages, prompt)
        if lost is None:
            # What the user says may stand in the system's words, too: "yes" in "say yes or no".
            choices = itertools.islice(placements([part for _, part in told], prompt), MOST_CHOICES)
            if any(first_missing(said, messages, prompt, taken) is None for taken in choices):
                return
            found = (one for one in told if find_words(one[1], prompt, 0) is None)
            lost = next(found, told[0])
        number, part = lost
        raise DataError(
            f"the chat template drops message {number + 1}, from the {messages[number]['role']}: "
            f"{short(part)}"
        )

    def _without_tools(self, messages: Sequence[Message]) -> str:
        try:
            return self.template.text(messages, None, answer_next=True)
        except DataError:
            return ""


def _learned(conversation: Conversation, loss_on: str) -> list[int]:
    """Returns which messages are learned.

    They are the assistant's that say something, after the first message, unless the data says no.
    """
    pairs = zip(conversation.messages, conversation.learned, strict=True)
    learned = [
        index
        for index, (message, flag) in enumerate(pairs)
        if index and message["role"] == "assistant" and flag is not False
        and (message["content"].strip() or message.get("tool_calls"))
    ]  # fmt: skip
    return learned[-1:] if loss_on == LAST else learned


def _answer_number(messages: Sequence[Message], index: int) -> int:
    """Returns which of the answers message `index` is, counted from 1."""
    return sum(message["role"] == "assistant" for message in messages[: index + 1])


def _first_difference(prompt: str, text: str) -> str:
    """Returns where two texts part, in a few words of each."""
    pairs = enumerate(zip(prompt, text, strict=False))
    index = next((n for n, (a, b) in pairs if a != b), min(len(prompt), len(text)))
    begin = max(0, index - 10)
    return f"{short(prompt[begin : begin + 40])} and {short(text[begin : begin + 40])}"
