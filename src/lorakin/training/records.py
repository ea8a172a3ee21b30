"""Rows of data with their places, for messages; and their labels by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from lorakin.errors import DataError
from lorakin.training.contents import (
    Content,
    Labelled,
    Tagged,
    label_text,
    listed,
    short_json,
)
from lorakin.training.formats import Format


@dataclasses.dataclass(frozen=True)
class Source:
    """A file or hub data set: its name, its format, and the names of its classes, if it has any."""

    name: str
    format: Format
    label_names: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """A row: its source, its number there (from 1), its columns, and what it says."""

    source: Source
    number: int
    values: Mapping[str, Any]
    content: Content

    @property
    def where(self) -> str:
        """The row's place, for messages."""
        return f"{self.source.name}, row {self.number}"

    def label(self) -> str:
        """Returns the name of the row's class.

        Raises:
            DataError: it has none.
        """
        value = self.content.label if isinstance(self.content, Labelled) else None
        names = self.source.label_names
        if names is not None:
            if not isinstance(value, int) or not 0 <= value < len(names):
                raise DataError(
                    f"{self.where}: label {value!r} is none of the classes 0 to {len(names) - 1}; "
                    "remove such rows"
                )
            return names[value]
        if not isinstance(value, str | int | float) or value != value or not _is_class(value):
            raise DataError(
                f"{self.where}: label {repr(value)[:80]} is not a class; expected text or whole "
                "numbers"
            )
        return label_text(value)

    def check_known(
        self, named: Iterable[str], labels: Collection[str], what: str = "label"
    ) -> None:
        """Checks that the row's classes are among `labels`.

        Raises:
            DataError: one is not.
        """
        if unknown := [label for label in named if label not in labels]:
            raise DataError(f"{self.where}: {what} {unknown[0]!r} is none of {', '.join(labels)}")

    def tags(self) -> list[str]:
        """Returns the names of the words' classes.

        Raises:
            DataError: a tag is not a class.
        """
        tags = self.content.tags if isinstance(self.content, Tagged) else []
        return self._named(tags, "tag")

    def _named(self, labels: Sequence[Any], what: str) -> list[str]:
        names = self.source.label_names
        if names is not None and all(isinstance(n, int) and 0 <= n < len(names) for n in labels):
            return [names[n] for n in labels]
        if wrong := [v for v in labels if not isinstance(v, str | int | float) or not _is_class(v)]:
            raise DataError(f"{self.where}: {what} {short_json(wrong[0])} is not a class")
        return [label_text(label) for label in labels]

    def number_label(self) -> float:
        """Returns the row's label as a number.

        Raises:
            DataError: it is none.
        """
        value = self.content.label if isinstance(self.content, Labelled) else None
        try:
            number = float(value) if not isinstance(value, bool) else math.nan  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(
                f"{self.where}: label {short_json(value)} is not a number, which regression "
                "learns; for classes say --task classification"
            )
        return number

    def label_set(self) -> list[str]:
        """Returns the names of the row's classes.

        Raises:
            DataError: its label is not a list of classes.
        """
        value = self.content.label if isinstance(self.content, Labelled) else None
        return self._named(listed(value, "label"), "label")


def is_fraction(value: Any) -> bool:
    """Returns whether a label is a number, or the text of one, that is not whole.

    >>> is_fraction("2.5"), is_fraction(3.0), is_fraction("good")
    (True, False, False)
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return False
    return isinstance(value, float) and math.isfinite(value) and not float(value).is_integer()


def _is_class(value: str | int | float) -> bool:
    return not isinstance(value, float) or (float(value).is_integer() and abs(value) < 2**53)
