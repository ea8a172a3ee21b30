"""Rows to be answered: those that `lorakin train` reads, with or without their answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorakin.errors import DataError
from lorakin.training import data_files, formats
from lorakin.training.contents import (
    Content,
    Conversation,
    Judged,
    PlainText,
    Preference,
    Tagged,
)
from lorakin.training.formats import FEEDBACK, FORMATS, PREFERENCE, PREFERENCES, Format
from lorakin.training.reading import mapped, row_in_message

NOT_ASKED = {*PREFERENCES, "label", "labels"}
"""Columns that say something of answers; a prompt does not need them."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A row that is to be answered.

    Attributes:
        number: which of the rows it is, from 0.
        where: its place in the data, for messages.
        values: its columns.
        content: what is asked.
    """

    number: int
    where: str
    values: Mapping[str, Any]
    content: Conversation | PlainText


def read_prompts(
    name: str, columns: Mapping[str, str] | None = None, layout: str | None = None
) -> list[Prompt]:
    """Reads the prompts of a data file or hub data set; answers in it are left aside.

    Args:
        name, columns, layout: as for `read_rows`. Only the columns of the question are needed.

    Raises:
        DataError: nothing there, unreadable, columns of no known format, or a row that asks
            nothing.
    """
    numbered, _ = data_files.table(name)
    if not numbered:
        raise DataError(f"data {name!r} has no rows")
    columns = columns or {}
    asked = [_asked(name, number, row, columns) for number, row in numbered]
    row_format = _format(asked, name, layout)
    prompts = []
    for place, ((number, row), question) in enumerate(zip(numbered, asked, strict=True)):
        answers = row_format.columns[len(_question(row_format)) :]
        blank = {column: "" for column in answers if question.get(column) is None}
        try:
            content = formats.read(row_format, {**question, **blank}, mapped=bool(columns))
            prompt = without_answer(content)
        except DataError as error:
            raise DataError(
                f"{name}, row {number}: {error} (format {row_format.name}). The row: "
                f"{row_in_message(row)}"
            ) from None
        prompts.append(Prompt(place, f"{name}, row {number}", row, prompt))
    return prompts


def digest(prompts: Sequence[Prompt]) -> str:
    """Returns a digest of prompts: others have another one."""
    text = json.dumps([dataclasses.asdict(one.content) for one in prompts], default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _asked(
    name: str, number: int, row: Mapping[str, Any], columns: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the columns that count: those that are named, or all but what is said of answers."""
    if columns:
        return mapped(name, number, row, columns)
    return {key: value for key, value in row.items() if key not in NOT_ASKED}


def _question(layout: Format) -> tuple[str, ...]:
    """Returns the columns of a format that ask: all but the last, or the only one."""
    return layout.columns[:-1] or layout.columns


def _format(rows: Sequence[Mapping[str, Any]], name: str, chosen: str | None) -> Format:
    """Returns the format whose columns most rows have: all of them, or those that ask.

    Raises:
        DataError: there is none.
    """
    counts = {
        layout: (
            sum(set(_question(layout)) <= row.keys() for row in rows),
            sum(set(layout.columns) <= row.keys() for row in rows),
        )
        for layout in FORMATS
        if chosen in (None, layout.name) and layout.name not in (PREFERENCE, FEEDBACK)
    }
    best = max(counts, key=counts.__getitem__, default=None)
    if best is None or counts[best][0] == 0:
        return formats.detected(rows, name, chosen)  # it says what is wrong
    return best


def without_answer(content: Content) -> Conversation | PlainText:
    """Returns what is asked: without the messages or the text of the answer.

    Raises:
        DataError: nothing is asked.
    """
    if isinstance(content, Conversation):
        last = len(content.messages)
        while last and content.messages[last - 1]["role"] == "assistant":
            last -= 1
        if not any(message["role"] != "system" for message in content.messages[:last]):
            raise DataError("no message asks anything")
        messages, learned = content.messages[:last], content.learned[:last]
        return dataclasses.replace(content, messages=messages, learned=learned)
    if isinstance(content, Tagged | Preference | Judged):
        raise DataError("it has no single right answer to a prompt")
    text = content.prompt or content.answer if isinstance(content, PlainText) else content.text
    if not text.strip():
        raise DataError("the prompt is empty")
    return PlainText(text, "")
