"""Rows as token ids and labels: what a model reads, and what it learns of it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from lorakin.errors import DataError
from lorakin.training.answers import ALL, ANSWERS, LOSS_ON, Answers
from lorakin.training.contents import Content, Conversation, PlainText
from lorakin.training.endings import stop_ids
from lorakin.training.reading import DataRows, row_in_message
from lorakin.training.records import Record
from lorakin.training.templates import Template
from lorakin.training.token_labels import IGNORED, continued
from lorakin.waiting import tracked


class NothingLearnedError(DataError):
    """Of some rows none has anything to learn."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokenised rows that have something to learn.

    Attributes:
        examples: `input_ids` and `labels` of each row; a classifier's label is one number.
        dropped: how many rows have nothing to learn.
        cut: how many rows have a last answer that does not end within the length.
        where: each example's place in the data, for messages.
        of_sources: how many examples each source has, in their order; None if nobody asked.
    """

    examples: list[dict[str, Any]]
    dropped: int
    cut: int = 0
    where: list[str] = dataclasses.field(default_factory=list)
    of_sources: list[int] | None = None

    @classmethod
    def joined(cls, parts: Sequence[Encoded]) -> Encoded:
        """Returns the examples of several sources as one."""
        return cls(
            [example for part in parts for example in part.examples],
            sum(part.dropped for part in parts),
            sum(part.cut for part in parts),
            [place for part in parts for place in part.where],
            [len(part.examples) for part in parts],
        )


class Encoder:
    """Makes token ids and labels of what rows say.

    Args:
        tokenizer: a transformers tokenizer; its chat template is used if it has one.
        loss_on: "answers", "last" or "all"; see `Answers.encode`.
        day: the day that a template prints; by default today.

    Raises:
        DataError: an unknown `loss_on`.
    """

    def __init__(
        self, tokenizer: Any, loss_on: str = ANSWERS, day: datetime.date | None = None
    ) -> None:
        if loss_on not in LOSS_ON:
            raise DataError(f"loss_on must be {', '.join(LOSS_ON)}, not {loss_on!r}")
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.template = Template(tokenizer, day) if tokenizer.chat_template else None
        self.answers = Answers(self.template) if self.template is not None else None

    @cached_property
    def ends(self) -> set[int]:
        """The ids at which an answer ends."""
        return set(stop_ids(self.tokenizer, chat_template=self.template or False))

    def encode(self, content: Content) -> tuple[list[int], list[int]]:
        """Returns the token ids and labels of one conversation or text.

        Raises:
            DataError: a conversation without a chat template, one that cannot be verified, or a
                text with a class.
        """
        if isinstance(content, PlainText) and not content.is_raw:
            content = self._in_template(content)
        if isinstance(content, PlainText):
            return self._text(content)
        if not isinstance(content, Conversation):
            raise DataError("it has a label, which a language model does not learn")
        if self.answers is None:
            raise DataError(
                "conversations need a tokenizer with a chat template; use an instruct model, or "
                "give a template with --chat-template FILE"
            )
        return self.answers.encode(content, self.loss_on)

    def _in_template(self, content: PlainText) -> PlainText | Conversation:
        """Returns a prompt and its answer as messages, if the template is for them."""
        if not self.takes_template(content.prompt):
            return content
        turns = [
            {"role": "user", "content": content.prompt},
            {"role": "assistant", "content": content.answer},
        ]
        return Conversation(turns, [None, None])

    def takes_template(self, prompt: str) -> bool:
        """Returns whether a prompt goes into the template; one that the template wrote does not."""
        if self.template is None or not prompt:
            return False
        opening = self.template.opening.strip()
        return not (opening and prompt.rstrip().endswith(opening))

    def prompt(self, prompt: str) -> list[int]:
        """Returns the tokens that stand before the answer to a prompt."""
        if self.template is not None:
            return self.template.prompt([{"role": "user", "content": prompt}])
        return self.opened(prompt)

    def opened(self, text: str) -> list[int]:
        """Returns the tokens of a text, with one BOS token before it if the tokenizer adds it."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        ends_itself = text.endswith(str(self.tokenizer.eos_token))
        if ids and ids[-1] == eos and (ids[-2:-1] == [eos] or not ends_itself):
            ids = ids[:-1]
        return ids[1:] if ids[:1] == ids[1:2] == [bos] else ids

    def _text(self, content: PlainText) -> tuple[list[int], list[int]]:
        ids = self.opened(content.prompt)
        if not content.answer:
            return ids, [IGNORED] * len(ids)
        if content.prompt:
            answer = continued(self.tokenizer, content.prompt, content.answer)
        else:
            ids, answer = [], self.opened(content.answer)
        ends = tuple(self.tokenizer.convert_ids_to_tokens(sorted(self.ends)))
        closed = content.answer.rstrip().endswith(ends)
        if self.tokenizer.eos_token_id is not None and not closed:
            answer = [*answer, self.tokenizer.eos_token_id]
        labels = ids + answer if self.loss_on == ALL else [IGNORED] * len(ids) + answer
        return ids + answer, labels


def encode(
    rows: DataRows,
    tokenizer: Any,
    max_length: int,
    loss_on: str = ANSWERS,
    day: datetime.date | None = None,
    split: bool = False,
) -> Encoded:
    """Tokenises rows for a causal language model; labels are -100 where no loss is taken.

    Conversations and prompts go through the tokenizer's chat template, if it has one. The loss is
    on the assistant's turns, each with the token that ends it; see `Answers.encode`.

    Args:
        rows: the rows.
        tokenizer: a transformers tokenizer.
        max_length: tokens at which rows are cut.
        loss_on: "answers", "last" or "all".
        day: the day that a template prints; by default today.
        split: whether plain texts go on in rows of their own instead of being cut; see `pieces`.

    Raises:
        DataError: a conversation without a chat template, one that cannot be verified, or no row
            with anything to learn.
    """
    kept, dropped, cut, answers = list[tuple[str, dict[str, Any]]](), 0, 0, False
    whole_rows = _encode_rows(rows, tokenizer, loss_on, day)
    for record, whole in zip(rows.records, whole_rows, strict=True):
        is_split = split and isinstance(record.content, PlainText) and not record.content.prompt
        parts = pieces(whole, max_length) if is_split else [_cut(whole, 0, max_length)]
        learned = [(record.where, part) for part in parts if has_answer(part)]
        kept += learned
        answers = answers or bool(learned) or has_answer(whole)
        dropped += not learned
        cut += bool(learned) and not is_split and learns(whole["labels"][max_length:])
    if not kept:
        if not answers:
            raise NothingLearnedError(
                f"{rows.name}: all labels are masked: none of the {len(rows)} rows has an answer, "
                "however long it may be; give rows whose last turn is the assistant's, or a "
                "completion that is not empty"
            )
        raise NothingLearnedError(
            f"{rows.name}: all labels are masked: none of the {len(rows)} rows has an answer "
            f"within --max-length {max_length} tokens; raise it, if the model has positions for "
            "more, or check that the answers are not empty"
        )
    where, examples = [where for where, _ in kept], [example for _, example in kept]
    return Encoded(examples, dropped, cut, where)


def pieces(row: dict[str, list[int]], length: int) -> list[dict[str, list[int]]]:
    """Returns a row as pieces of at most `length` tokens, of which every token is learned.

    Each piece begins with the last token of the one before, since nothing predicts a first token.

    >>> [piece["input_ids"] for piece in pieces({"input_ids": [1, 2, 3, 4], "labels": []}, 3)]
    [[1, 2, 3], [3, 4]]

    Args:
        row: `input_ids` and `labels`.
        length: the most tokens of a piece.
    """
    starts = range(0, max(1, len(row["input_ids"]) - 1), max(1, length - 1))
    return [_cut(row, start, start + length) for start in starts]


def _cut(row: dict[str, list[int]], start: int, end: int) -> dict[str, list[int]]:
    return {key: part[start:end] for key, part in row.items()}


def with_answers(
    rows: DataRows,
    tokenizer: Any,
    max_length: int,
    loss_on: str = ANSWERS,
    day: datetime.date | None = None,
) -> DataRows:
    """Returns the rows that `encode` keeps: those with something to learn within the length.

    Raises:
        DataError: as `encode`, except that no row need be left.
    """
    pairs = zip(rows.records, _encode_rows(rows, tokenizer, loss_on, day), strict=True)
    kept = [record for record, example in pairs if learns(example["labels"][1:max_length])]
    return dataclasses.replace(rows, records=kept)


def _encode_rows(
    rows: DataRows, tokenizer: Any, loss_on: str, day: datetime.date | None
) -> Iterator[dict[str, Any]]:
    encoder = Encoder(tokenizer, loss_on, day)
    for record in tracked(rows.records, "tokenising"):
        try:
            ids, labels = encoder.encode(record.content)
        except DataError as error:
            raise error_of_row(record, error) from error
        yield {"input_ids": ids, "labels": labels}


def error_of_row(record: Record, error: Exception) -> DataError:
    """Returns an error with the row in which it occurred."""
    layout = record.source.format.name
    return DataError(
        f"{record.where}: {error} (format {layout}). The row: {row_in_message(record.values)}"
    )


def has_answer(example: Mapping[str, Any]) -> bool:
    """Returns whether something of a tokenised row is learned."""
    return learns(example["labels"][1:])  # nothing predicts the first token


def learns(labels: Sequence[int]) -> bool:
    """Returns whether there is a label among these."""
    return any(label != IGNORED for label in labels)


def prompt_ids(prompt: str, tokenizer: Any, chat_template: bool = True) -> list[int]:
    """Returns the tokens that training puts before the answer to `prompt`."""
    encoder = Encoder(tokenizer)
    return encoder.prompt(prompt) if chat_template else encoder.opened(prompt)
