"""Rows of two answers, and answers that are good or not, as token ids and labels."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from typing import Any

from lorakin.errors import DataError
from lorakin.training.answers import ALL, ANSWERS
from lorakin.training.batches import GOOD, SIDES
from lorakin.training.contents import Content, Judged, PlainText, Preference
from lorakin.training.encoding import (
    Encoded,
    Encoder,
    NothingLearnedError,
    error_of_row,
    has_answer,
    learns,
)
from lorakin.training.reading import DataRows
from lorakin.training.records import Record
from lorakin.waiting import tracked

ROOM = "room"
"""The key of how many tokens of an answer fit behind a row's prompt."""
Tokens = dict[str, Any]


class PairEncoder:
    """Makes token ids and labels of answers that are compared, exactly as of those to imitate.

    Args:
        rows: the rows.
        tokenizer: a transformers tokenizer.
        max_length: tokens at which an answer with its prompt is cut.
        loss_on: which turns of an answer count: "answers" or "last".
        day: the day that a template prints; by default today.
        others: options of other tasks, which do not count here.

    Raises:
        DataError: `loss_on` is "all": what is compared are answers.
    """

    def __init__(
        self,
        rows: DataRows,
        tokenizer: Any,
        max_length: int,
        loss_on: str = ANSWERS,
        day: datetime.date | None = None,
        **others: Any,
    ) -> None:
        if loss_on == ALL:
            raise DataError(f"--loss-on {ALL} is for answers to imitate; here answers are compared")
        self.rows, self.max_length = rows, max_length
        self.encoder = Encoder(tokenizer, loss_on, day)
        self.cut = 0

    def pairs(self, *, whole: bool = False) -> Encoded:
        """Returns rows with two sides; `whole` drops those of which a side has to be cut.

        Raises:
            DataError: a row without two answers, one that cannot be verified, or none that is left.
        """

        def of_row(content: Content) -> list[Tokens]:
            if not isinstance(content, Preference):
                raise DataError("it has no two answers to compare")
            sides = {side: self._tokens(getattr(content, side)) for side in SIDES}
            longest = max(len(side["input_ids"]) for side in sides.values())
            too_long = whole and longest > self.max_length
            cut = {side: self._cut(tokens) for side, tokens in sides.items()}
            self.cut += not too_long and any(_lost(sides[side], cut[side]) for side in SIDES)
            learned = all(has_answer(tokens) for tokens in cut.values())
            return [cut] if learned and not too_long else []

        return self._encoded(of_row)

    def judged(self) -> Encoded:
        """Returns rows with an answer that is good or not; of a pair, one row for each side.

        Raises:
            DataError: a row without a verdict, one that cannot be verified, or none that is left.
        """

        def of_row(content: Content) -> list[Tokens]:
            if isinstance(content, Preference):
                both = [Judged(content.chosen, True), Judged(content.rejected, False)]
            elif isinstance(content, Judged):
                both = [content]
            else:
                raise DataError("nothing says whether its answer is good")
            found = []
            for one in both:
                tokens = self._tokens(one.answer)
                cut = self._cut(tokens)
                self.cut += _lost(tokens, cut)
                if has_answer(cut):
                    room = self.max_length - prompt_length(cut)
                    found.append({**cut, GOOD: one.is_good, ROOM: room})
            return found

        return self._encoded(of_row)

    def _encoded(self, of_row: Callable[[Content], list[Tokens]]) -> Encoded:
        examples: list[Tokens] = []
        where: list[str] = []
        dropped = 0
        for record in tracked(self.rows.records, "tokenising"):
            found = self._of_record(record, of_row)
            dropped += not found
            examples += found
            where += [record.where] * len(found)
        if not examples:
            raise NothingLearnedError(
                f"{self.rows.name}: none of the {len(self.rows)} rows has its answers within "
                f"--max-length {self.max_length} tokens; raise it, if the model has positions for "
                "more"
            )
        return Encoded(examples, dropped, self.cut, where)

    def _of_record(self, record: Record, of_row: Callable[[Content], list[Tokens]]) -> list[Tokens]:
        try:
            return of_row(record.content)
        except DataError as error:
            raise error_of_row(record, error) from error

    def _tokens(self, side: Content) -> Tokens:
        tokenizer = self.encoder.tokenizer
        if isinstance(side, PlainText) and tokenizer.chat_template is None and _joins(tokenizer):
            # An encoder reads two texts as it was trained to.
            both = (side.prompt, side.answer) if side.prompt else (side.answer,)
            encoded = {key: list(ids) for key, ids in tokenizer(*both).items()}
            encoded.pop("attention_mask", None)
            return {**encoded, "labels": list(encoded["input_ids"])}
        ids, labels = self.encoder.encode(side)
        return {"input_ids": ids, "labels": labels}

    def _cut(self, tokens: Tokens) -> Tokens:
        return {key: part[: self.max_length] for key, part in tokens.items()}


def prompt_length(tokens: Mapping[str, Any]) -> int:
    """Returns how many tokens stand before the first that is learned.

    >>> prompt_length({"labels": [-100, -100, 5, 6]})
    2
    """
    labels = tokens["labels"]
    return next((n for n, label in enumerate(labels) if learns([label])), len(labels))


def _lost(tokens: Tokens, cut: Tokens) -> bool:
    """Returns whether something that is learned was cut off."""
    return has_answer(cut) and learns(tokens["labels"][len(cut["labels"]) :])


def _joins(tokenizer: Any) -> bool:
    """Returns whether a tokenizer puts a token between two texts, as those of encoders do."""
    return getattr(tokenizer, "sep_token_id", None) is not None
