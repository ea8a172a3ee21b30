"""Files of cells between commas or tabs, as numbered rows; every cell is text."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from lorakin.errors import DataError

LONGEST_CELL = 1 << 27
"""Characters of the longest CSV cell. Python's own limit, 131,072, is less than some documents."""
Rows = Iterator[tuple[int, dict[str, Any]]]


def separated(delimiter: str) -> Callable[[IO[bytes]], tuple[Rows, dict[str, list[str]]]]:
    """Returns what reads rows of cells below a header; .tsv files are read whole.

    Args:
        delimiter: what stands between cells; a comma may be a semicolon.
    """

    def read(file: IO[bytes]) -> tuple[Rows, dict[str, list[str]]]:
        # UTF-8, or UTF-16 if the text begins with its mark, as Excel writes it.
        begins = file.read(2)
        file.seek(0)
        encoding = "utf-16" if begins in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = io.TextIOWrapper(file, encoding=encoding, newline="")
        if delimiter == "\t":
            whole = text.read()
            if (rows := _unquoted(whole)) is not None:
                return iter(rows), {}
            text = io.StringIO(whole, newline="")  # type: ignore[assignment]
        first = text.readline()
        mark = ";" if delimiter == "," and "," not in first and ";" in first else delimiter
        lines = itertools.chain([first], text)
        return _cells(csv.reader(lines, delimiter=mark, strict=True)), {}

    return read


def _unquoted(text: str) -> list[tuple[int, dict[str, Any]]] | None:
    """Reads lines of cells between tabs, where a quote is a quote; None if cells span lines."""
    lines = [line.split("\t") for line in text.replace("\r\n", "\n").split("\n") if line]
    if len({len(cells) for cells in lines}) != 1:
        return None
    quoted = re.compile(r'"(?:[^"]|"")*"')
    plain = [
        [c[1:-1].replace('""', '"') if quoted.fullmatch(c) else c for c in cells] for cells in lines
    ]
    return list(_cells(iter(plain)))


def _with_long_cells(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yields a csv reader's rows; Python has one limit of a cell's length for all its readers."""
    while True:
        limit = csv.field_size_limit(LONGEST_CELL)
        try:
            cells = next(reader, None)
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        yield cells


def _cells(reader: Any) -> Rows:
    lines = _with_long_cells(reader)
    try:
        header = [name.strip() for name in next(lines, [])]
        # Excel writes empty columns at the end.
        nameless = next((n for n, name in enumerate(reversed(header)) if name), len(header))
        width = len(header) - nameless
        if twice := [name for name in header[:width] if header.count(name) > 1]:
            raise DataError(f"the column {twice[0]!r} stands in the header twice")
        for number, cells in enumerate((cells for cells in lines if cells), 1):
            if len(cells) != len(header) or any(cells[width:]):
                raise DataError(
                    f"row {number} has {len(cells)} cells, and the header {width}: "
                    f"{str(cells)[:120]}"
                )
            yield number, dict(zip(header[:width], cells[:width], strict=True))
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num}: {error}; is a quote missing, or another separator meant?"
        ) from None
