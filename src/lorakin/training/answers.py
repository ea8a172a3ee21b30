"""Which tokens of a conversation a model is to learn: exactly the answers, each with the end of its turn.

A chat template turns messages into one text. What an answer must follow is what generation would send: the
same template over the messages before it, with its opening of an answer. So an answer is learned from where
that prompt ends to the token that ends the turn, and all of it is checked: the prompt is there character by
character and token by token, the answer's own words follow it, and nothing stands between them but what the
template itself writes. A conversation that fails is refused, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from lorakin.errors import DataError
from lorakin.training.formats import Conversation
from lorakin.training.templates import Template

IGNORED = -100
LAST, ANSWERS, ALL = "last", "answers", "all"
LOSS_ON = (LAST, ANSWERS, ALL)
TAIL = 400
"""Characters before an answer within which a tokenizer may join something with its first ones; and many more."""
THOUGHTS = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<said>.*)", re.DOTALL)
WORDS = re.compile(r"\w+")


class Unverified(DataError):
    """A conversation whose learned part cannot be shown to be its answers."""


class Answers:
    """Finds what is learned of conversations that a chat template writes.

    Args:
        template: the chat template.
    """

    def __init__(self, template: Template) -> None:
        self.template = template

    def encode(
        self, conversation: Conversation, loss_on: str = ANSWERS
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation; labels are -100 where nothing is learned.

        Args:
            conversation: its messages, and which of them are to be learned where the data says so.
            loss_on: "answers" (every turn of the assistant that follows something), "last" (the last of them), or
                "all" (every token).

        Raises:
            Unverified: what would be learned is not exactly the answers with the ends of their turns, or the prompt
                of one is not what generation would send.
            DataError: the template does not take the conversation.
        """
        tools = conversation.tools
        messages = list(conversation.messages)
        if not messages:
            return [], []
        learned = _learned(conversation, loss_on)
        if loss_on == ALL:
            text = self.template.text(messages, tools)
            self._check_said(messages, text, tools, _learned(conversation, ANSWERS))
            ids = self.template.ids(text)
            return ids, list(ids)
        if not learned:
            ids = self.template.ids(self.template.text(messages, tools))
            return ids, [IGNORED] * len(ids)
        messages = messages[
            : learned[-1] + 1
        ]  # what follows the last learned answer teaches nothing
        prompts = {at: self.template.text(messages[:at], tools, answer_next=True) for at in learned}
        self._check_said(messages[: learned[-1]], prompts[learned[-1]], tools)
        for at in learned if self.template.reads_thoughts else ():
            messages[at] = _with_thoughts(messages[at])
        whole = self.template.text(messages, tools)
        try:
            spans = [self._span(messages, at, tools, prompts[at], whole) for at in learned]
        except Unverified as reason:
            if len(learned) > 1:
                raise Unverified(
                    f"{reason}. Train on the last answer alone with --loss-on last, or give another template with "
                    "--chat-template FILE"
                ) from None
            return self._alone(messages, prompts[learned[-1]], reason)
        return self._masked(*self._closed(whole, spans))

    def _span(
        self, messages: Sequence[Mapping[str, Any]], at: int, tools: Any, prompt: str, whole: str
    ) -> tuple[int, int]:
        """Where in the whole text the answer that is message `at` is learned, with the end of its turn if it is there."""
        number = _nth(messages, at)
        if not whole.startswith(prompt):
            raise Unverified(
                f"generation would send another prompt for answer {number} than the template writes before it in the "
                f"whole conversation: {_apart(prompt, whole)}"
            )
        start = end = len(prompt)
        for words in _said(messages[at]):
            if (found := _found(words, whole, end)) is None:
                raise Unverified(
                    f"the template drops or changes what answer {number} says: {_short(words)} is not in it"
                    + (
                        " (its reasoning_content)"
                        if words in messages[at].get("reasoning_content", "")
                        else ""
                    )
                )
            found = (
                _standing(words, whole, end, ()) or found
            )  # "a" is not that of a template's own "channel"
            if strange := self._strange(whole[end : found[0]], messages[at]):
                raise Unverified(f"the template puts {_short(strange)} into answer {number}")
            end = found[1]
        if messages[at].get("tool_calls"):
            end = self._call_ends(messages, at, tools, whole, end)
        else:
            end = self._turn_ends(messages, at, whole, end)
        if lost := [
            value for value in _arguments(messages[at]) if _found(value, whole[:end], start) is None
        ]:
            raise Unverified(
                f"the template drops what a call of answer {number} says: {_short(lost[0])} is not in it"
            )
        return start, end

    def _call_ends(
        self, messages: Sequence[Mapping[str, Any]], at: int, tools: Any, whole: str, said: int
    ) -> int:
        """Where a turn with calls ends: where the template ends it when nothing follows, or with the token after that."""
        alone = self.template.text(messages[: at + 1], tools).rstrip()
        if not whole.startswith(alone) or len(alone) < said:
            raise Unverified(
                f"the template writes the calls of answer {_nth(messages, at)} otherwise when others follow"
            )
        token = next(
            (t for t in self.template.specials.finditer(whole, said) if t.end() >= len(alone)), None
        )
        end = len(alone) if token is None else token.end()
        if whole[len(alone) : end].strip() not in ("", token.group() if token is not None else ""):
            raise Unverified(f"no token ends the turn of answer {_nth(messages, at)}")
        if strange := self._strange(whole[said:end], messages[at]):
            raise Unverified(
                f"the template puts {_short(strange)} into answer {_nth(messages, at)}"
            )
        return end

    def _turn_ends(
        self, messages: Sequence[Mapping[str, Any]], at: int, whole: str, end: int
    ) -> int:
        """Where the turn ends whose answer's words end at `end`: after the token that ends a turn, if there is one."""
        known = self.template.endings.tokens(self.template.specials)
        tokens = list(self.template.specials.finditer(whole, end))
        for token in (*(token for token in tokens if token.group() in known), *tokens[:1]):
            if not self._strange(whole[end : token.start()], messages[at]):
                return token.end()
        rest = whole[end:].rstrip()
        if at == len(messages) - 1 and not self._strange(rest, messages[at]):
            return end + len(rest)
        raise Unverified(f"no token ends the turn of answer {_nth(messages, at)}")

    def _closed(
        self, whole: str, spans: list[tuple[int, int]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and its spans, the last answer ended as another turn would end it where the template ends none."""
        start, end = spans[-1]
        if any(token.end() == end for token in self.template.specials.finditer(whole, start, end)):
            return whole, spans
        whole = whole[:end] + self.template.endings.last
        return whole, [*spans[:-1], (start, len(whole))]

    def _strange(self, between: str, message: Mapping[str, Any]) -> str | None:
        """A word of the text that is neither the template's own nor the message's."""
        own = {
            *WORDS.findall(json.dumps(message)),
            *WORDS.findall(json.dumps(message, ensure_ascii=False)),
        }
        own |= {word for part in _said(message) for word in WORDS.findall(part)} | self._words
        return next((word for word in WORDS.findall(between) if word not in own), None)

    @cached_property
    def _words(self) -> set[str]:
        source = self.template.source().encode().decode("unicode_escape", errors="ignore")
        return {*WORDS.findall(self.template.source()), *WORDS.findall(source)}

    def _alone(
        self, messages: Sequence[Mapping[str, Any]], prompt: str, why: Unverified
    ) -> tuple[list[int], list[int]]:
        """The prompt that generation would send, and after it the last answer, where the template shows it otherwise."""
        message, before = messages[-1], self.template.endings.before
        if message.get("tool_calls"):
            raise why
        answer, opened = message["content"], re.search(r"<think>\s*$", prompt)
        if message.get("reasoning_content"):
            if not opened:
                raise why
            answer = f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n{answer}"
        if opened:
            if not (inner := THOUGHTS.fullmatch(answer)):
                quiet = (
                    "--template-arg enable_thinking=false, or "
                    if "enable_thinking" in self.template.source()
                    else ""
                )
                raise Unverified(
                    "generation opens the answer with <think>, and this one has no reasoning; give it in the answer "
                    f"(<think>…</think>, which may be empty), or give {quiet}another template with --chat-template FILE"
                )
            answer = f"{inner['thought'].lstrip()}</think>{inner['said']}"
        before = "" if before.strip() and answer.startswith(before) else before
        ids, learned = self.template.ids(prompt), f"{before}{answer}{self.template.endings.last}"
        answered = continued(self.template.tokenizer, prompt, learned)
        return ids + answered, [IGNORED] * len(ids) + answered

    def _check_said(
        self,
        messages: Sequence[Mapping[str, Any]],
        prompt: str,
        tools: Any,
        learned: Sequence[int] = (),
    ) -> None:
        """See that what messages say stands in a text, one after another; the system's words may stand anywhere.

        What was thought before templates leave out; of messages that are `learned` it counts too.
        """
        if tools and prompt == self._without_tools(messages, prompt):
            raise DataError(
                "the chat template does not write the row's tools; use a model whose template does"
            )
        at = 0
        places: list[tuple[int, int]] = []
        for number in sorted(
            range(len(messages)),
            key=lambda number: messages[number]["role"] in ("system", "developer"),
        ):
            message = messages[number]
            anywhere = message["role"] in ("system", "developer")
            for part in [*_said(message, thoughts=number in learned), *_arguments(message)]:
                place = _standing(part, prompt, 0 if anywhere else at, places if anywhere else ())
                if place is None and not (
                    part.lstrip()[:1] in ("{", "[") and _words_of(part, prompt)
                ):
                    raise DataError(
                        f"the chat template drops message {number + 1}, from the {message['role']}: {_short(part)}"
                    )
                if place is not None and not anywhere:
                    places.append(place)
                    at = (
                        place[0] if message.get("tool_calls") else place[1]
                    )  # a call's parts stand in any order

    def _without_tools(self, messages: Sequence[Mapping[str, Any]], prompt: str) -> str:
        try:
            return self.template.text(messages, None, answer_next=True)
        except DataError:
            return ""

    def _masked(self, whole: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Ids of the whole text, and labels on the spans: tokens that reach over the edge of a span are cut there."""
        pieces, at = [], 0
        for start, end in spans:
            pieces += [(at, start, False), (start, end, True)]
            at = end
        pieces.append((at, len(whole), False))
        tokenizer = self.template.tokenizer
        encoded = tokenizer(
            whole, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast
        )
        ids: list[int] = list(encoded["input_ids"])
        offsets = encoded["offset_mapping"] if tokenizer.is_fast else None
        if (
            offsets is not None
            and (labels := self._aligned(whole, ids, offsets, spans)) is not None
        ):
            return ids, labels
        ids, labels, before = [], [], ""
        for start, end, learns in pieces:
            part = (
                continued(self.template.tokenizer, self._last_of(before), whole[start:end])
                if before
                else self.template.tokenizer(whole[start:end], add_special_tokens=False)[
                    "input_ids"
                ]
            )
            ids += part
            labels += part if learns else [IGNORED] * len(part)
            before = whole[:end]
        return ids, labels

    def _last_of(self, text: str) -> str:
        """The end of a text from its last special token on, or of its last words: what follows it is not cut otherwise."""
        special = [
            token.start()
            for token in self.template.specials.finditer(text, max(0, len(text) - TAIL))
        ]
        return (
            text[special[-1] :]
            if special
            else text[max(0, text.rfind(" ", 0, max(0, len(text) - TAIL)) + 1) :]
        )

    def _aligned(
        self,
        whole: str,
        ids: list[int],
        offsets: Sequence[tuple[int, int]],
        spans: Sequence[tuple[int, int]],
    ) -> list[int] | None:
        """Labels on the spans; None if a token reaches over an edge, or the prompt alone has other tokens."""
        labels, at = [IGNORED] * len(ids), 0
        for start, end in spans:
            while at < len(ids) and offsets[at][1] <= start:
                at += 1
            if (at < len(ids) and offsets[at][0] < start) or not self._ends_alone(
                whole, ids, offsets, at, start
            ):
                return None
            while at < len(ids) and offsets[at][1] <= end:
                labels[at] = ids[at]
                at += 1
            if at < len(ids) and offsets[at][0] < end:
                return None
        return labels

    def _ends_alone(
        self, whole: str, ids: list[int], offsets: Sequence[tuple[int, int]], count: int, start: int
    ) -> bool:
        """Whether the first `count` tokens are those of `whole[:start]` alone, seen from the last special token on."""
        first = next(
            (n for n in range(count - 1, -1, -1) if ids[n] in self.template.special_ids), None
        )
        begin = 0 if first is None else offsets[first][0]
        alone: list[int] = self.template.tokenizer(whole[begin:start], add_special_tokens=False)[
            "input_ids"
        ]
        return alone == ids[0 if first is None else first : count]


def continued(tokenizer: Any, before: str, text: str) -> list[int]:
    """The tokens of `text` where it follows `before`, whose tokens are those that it has on its own.

    Tokenizers differ in what they do at the start of a text: some put a space there. So of several ways the first
    is taken that, with the tokens of `before`, stands for the same text as both together. A tokenizer that loses
    characters, such as one of whole words, can tell nothing by that: there the text has the tokens that it has alone.

    Raises:
        Unverified: none does.
    """

    def ids_of(part: str) -> list[int]:
        found: list[int] = tokenizer(part, add_special_tokens=False)["input_ids"]
        return found

    start, whole, line = ids_of(before), ids_of(before + text), ids_of("\n")
    wanted = tokenizer.decode(whole)
    tries = [whole[len(start) :]] if whole[: len(start)] == start else []
    tries.append(ids_of(text))
    if (after := ids_of("\n" + text))[: len(line)] == line:
        tries.append(after[len(line) :])
    for ids in tries:
        if tokenizer.decode(start + ids) == wanted:
            return ids
    if wanted.split() != (before + text).split():
        return ids_of(text)
    raise Unverified(f"the tokenizer cannot put {_short(text)} after the prompt as text of its own")


def _with_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    """The message, the reasoning in its content moved into `reasoning_content`."""
    found = THOUGHTS.fullmatch(message["content"]) if message["role"] == "assistant" else None
    if found is None or message.get("reasoning_content") or not found["thought"].strip():
        return message
    return {
        **message,
        "reasoning_content": found["thought"].strip("\n"),
        "content": found["said"].lstrip("\n"),
    }


def _learned(conversation: Conversation, loss_on: str) -> list[int]:
    """Which messages are learned: the assistant's, after the first, that say something, if the data does not say otherwise."""
    found = []
    for at, (message, flag) in enumerate(
        zip(conversation.messages, conversation.learned, strict=True)
    ):
        says = message["content"].strip() or message.get("tool_calls")
        if at and message["role"] == "assistant" and says and flag is not False:
            found.append(at)
    return found[-1:] if loss_on == LAST else found


def _said(message: Mapping[str, Any], thoughts: bool = True) -> Iterator[str]:
    """What a message says, in its order: what it thinks, if `thoughts`, its text, the names of its calls."""
    content = message["content"]
    thought = THOUGHTS.fullmatch(content) if message["role"] == "assistant" else None
    parts = (
        [message.get("reasoning_content", ""), thought["thought"] if thought else ""]
        if thoughts
        else []
    )
    parts.append(thought["said"] if thought else content)
    yield from (part.strip() for part in parts if part.strip())
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]


def _arguments(message: Mapping[str, Any]) -> Iterator[str]:
    """The single values in the arguments of its calls, as text."""

    def leaves(value: Any) -> Iterator[str]:
        if isinstance(value, Mapping | list):
            for item in value.values() if isinstance(value, Mapping) else value:
                yield from leaves(item)
        else:
            yield value if isinstance(value, str) else json.dumps(value)

    for call in message.get("tool_calls", ()):
        yield from leaves(call["function"]["arguments"])


def _found(words: str, text: str, start: int) -> tuple[int, int] | None:
    """Where the words stand in the text from `start` on, as they are or as JSON writes them."""
    words = words.strip()
    for written in (words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1]):
        if (at := text.find(written, start)) >= 0:
            return at, at + len(written)
    return None


def _standing(
    words: str, text: str, start: int, taken: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """The first place from `start` on where the words stand and are not part of longer words, nor at a place that is taken."""
    while (place := _found(words, text, start)) is not None:
        edges = ((place[0] - 1, place[0]), (place[1] - 1, place[1]))
        inside = any(
            a >= 0 and b < len(text) and WORDS.fullmatch(text[a]) and WORDS.fullmatch(text[b])
            for a, b in edges
        )
        if not inside and not any(place[0] < end and begin < place[1] for begin, end in taken):
            return place
        start = place[0] + 1
    return None


def _words_of(part: str, text: str) -> bool:
    """Whether all words of a JSON object stand in the text: templates write a tool's results in forms of their own."""
    return part.lstrip()[:1] in ("{", "[") and all(word in text for word in WORDS.findall(part))


def _nth(messages: Sequence[Mapping[str, Any]], at: int) -> int:
    """Which of the answers message `at` is, counted from 1."""
    return sum(message["role"] == "assistant" for message in messages[: at + 1])


def _apart(prompt: str, whole: str) -> str:
    """Where two texts part, in a few words of each."""
    at = next(
        (n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
        min(len(prompt), len(whole)),
    )
    begin = max(0, at - 10)
    return f"{_short(prompt[begin : begin + 40])} and {_short(whole[begin : begin + 40])}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
