"""Data files and hub data sets as tables: numbered rows, with every value as it stands there.

Python's `json` and `csv`, and pyarrow, read the files: nothing is cached, nothing is fetched, and
no cell is guessed to be a number or a date.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from lorakin.errors import DataError
from lorakin.storage import paths
from lorakin.training import formats
from lorakin.training.contents import Number

LONGEST_CELL = 1 << 27
"""Characters of the longest CSV cell. Python's own limit, 131,072, is less than some documents."""
MOST_UNPACKED, MOST_RATIO = 1 << 28, 200
"""Bytes that a gzip or Parquet file may unfold into; or so many times its size, if that is more."""
HUB_NAME = re.compile(
    r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?(:(?P<split>[^:\[\]]+(\[[^\]]*\])?))?"
)

Rows = list[tuple[int, dict[str, Any]]]
"""Each row's number in its file, from 1, and its columns."""
Table = tuple[Rows, dict[str, list[str]]]
"""Rows, and a column → the names of its classes, for columns that have names."""


def table(name: str) -> Table:
    """Returns the rows of a data file or of a hub data set.

    Args:
        name: a file, or org/set, org/set:split, org/set:config:split.

    Raises:
        DataError: nothing of that name, or it cannot be read.
    """
    path = paths.user_path(name, "--data", DataError)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"] and len(suffixes) > 1
    suffix = suffixes[-2] if packed else (suffixes[-1:] or [""])[0]
    reader = READERS.get(suffix)
    try:
        if path.exists() or reader is not None:
            return _file(path, reader, suffix)
        return _hub(name)
    except DataError:
        raise
    except Exception as error:  # parsers of files, and the hub's client, raise whatever they like
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"data {name!r} cannot be read: {reason[0]}") from error


def _file(path: Path, reader: Callable[[IO[bytes]], Table] | None, suffix: str) -> Table:
    if not path.exists():
        raise DataError(f"there is no data file {path}")
    # Opening a pipe would wait for its writer.
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"data {str(path)!r} is not a file")
    if reader is None:
        raise DataError(
            f"data {str(path)!r}: expected a file ending in {', '.join(READERS)}, "
            "perhaps with .gz after it"
        )
    if path.stat().st_size == 0:
        raise DataError(f"data {str(path)!r} is empty")
    with path.open("rb") as file:
        begins = file.read(4)
        file.seek(0)
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=file) as unpacked:
                return reader(io.BytesIO(_bounded(unpacked, path)))
        if begins[:2] == b"\x1f\x8b":
            raise DataError(f"data {str(path)!r} is packed with gzip; end its name in {suffix}.gz")
        if begins == b"PAR1" and suffix != ".parquet":
            raise DataError(f"data {str(path)!r} is a Parquet file; end its name in .parquet")
        return reader(file)


def _bounded(unpacked: gzip.GzipFile, path: Path) -> bytes:
    most = max(MOST_UNPACKED, MOST_RATIO * os.path.getsize(path))
    content = unpacked.read(most + 1)
    if len(content) > most:
        raise DataError(
            f"data {str(path)!r} unfolds into more than {most:,} bytes; "
            "unpack it yourself if it is meant"
        )
    return content


def _json_lines(file: IO[bytes]) -> Table:
    """Reads a JSON object on each line; or one JSON array of objects, as .json files hold."""
    start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    file.seek(0)
    if start.startswith(b"["):
        return _objects(_parsed(file.read(), "the file")), {}
    rows = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            rows.append((number, _object(_parsed(line, f"line {number}"), f"line {number}")))
        except DataError:
            if rows or not start.startswith(b"{"):
                raise
            file.seek(0)
            return _whole(file.read())
    return rows, {}


def _whole(content: bytes) -> Table:
    """Reads one object over many lines: a row, or an object that holds a list of rows."""
    content_object = _object(_parsed(content, "line 1"), "line 1")
    values = [value for value in content_object.values() if isinstance(value, list) and value]
    lists = [value for value in values if isinstance(value[0], dict)]
    is_row = any(set(layout.columns) <= content_object.keys() for layout in formats.FORMATS)
    if len(lists) == 1 and not is_row:
        return _objects(lists[0]), {}
    return [(1, content_object)], {}


def _objects(content: Any) -> Rows:
    return [(number, _object(row, f"row {number}")) for number, row in enumerate(content, 1)]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        text = json.dumps(value, default=str)[:80]
        raise DataError(f"{where} cannot be read as a row: it holds {text}, expected an object")
    return value


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(
            content.decode("utf-8-sig"),
            parse_float=Number,
            parse_int=_whole_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be read as JSON: {error}") from None


def _whole_number(literal: str) -> int | Number:
    """Returns a JSON number without a fraction; -0 stays as it is written."""
    return number if str(number := int(literal)) == literal else Number(literal)


def _no_number(literal: str) -> float:
    raise ValueError(f"{literal} is not a number in JSON")


def _separated(delimiter: str) -> Callable[[IO[bytes]], Table]:
    def read(file: IO[bytes]) -> Table:
        limit = csv.field_size_limit(LONGEST_CELL)
        try:
            text = _decoded(file.read())
            first = text.partition("\n")[0]
            mark = ";" if delimiter == "," and "," not in first and ";" in first else delimiter
            if mark == "\t" and (rows := _unquoted(text)) is not None:
                return rows, {}
            cells = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
            return _cells(cells), {}
        finally:
            csv.field_size_limit(limit)

    return read


def _decoded(content: bytes) -> str:
    """Decodes UTF-8, or UTF-16 if the text begins with its mark, as Excel writes it."""
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def _unquoted(text: str) -> Rows | None:
    """Reads lines of cells between tabs, where a quote is a quote; None if cells span lines."""
    lines = [line.split("\t") for line in text.replace("\r\n", "\n").split("\n") if line]
    if len({len(cells) for cells in lines}) != 1:
        return None
    quoted = re.compile(r'"(?:[^"]|"")*"')
    plain = [
        [c[1:-1].replace('""', '"') if quoted.fullmatch(c) else c for c in cells] for cells in lines
    ]
    return _cells(iter(plain))


def _cells(reader: Any) -> Rows:
    rows: Rows = []
    try:
        header = [name.strip() for name in next(reader, [])]
        # Excel writes empty columns at the end.
        nameless = next((n for n, name in enumerate(reversed(header)) if name), len(header))
        width = len(header) - nameless
        if twice := [name for name in header[:width] if header.count(name) > 1]:
            raise DataError(f"the column {twice[0]!r} stands in the header twice")
        for number, cells in enumerate((cells for cells in reader if cells), 1):
            if len(cells) != len(header) or any(cells[width:]):
                raise DataError(
                    f"row {number} has {len(cells)} cells, and the header {width}: "
                    f"{str(cells)[:120]}"
                )
            rows.append((number, dict(zip(header[:width], cells[:width], strict=True))))
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num}: {error}; is a quote missing, or another separator meant?"
        ) from None
    return rows


def _lines(file: IO[bytes]) -> Table:
    lines = enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), 1)
    return [(number, {"text": line.rstrip("\n")}) for number, line in lines if line.strip()], {}


def _parquet(file: IO[bytes]) -> Table:
    import datasets
    import pyarrow.parquet

    stored = pyarrow.parquet.ParquetFile(file).metadata
    cells = stored.num_rows * stored.num_columns
    size = sum(stored.row_group(n).total_byte_size for n in range(stored.num_row_groups))
    if max(cells, size) > max(MOST_UNPACKED, MOST_RATIO * file.seek(0, os.SEEK_END)):
        raise DataError(
            f"the table unfolds into {cells:,} cells of {size:,} bytes; keep the rows that are "
            "meant"
        )
    content = pyarrow.parquet.read_table(file)
    has_features = b"huggingface" in (content.schema.metadata or {})
    features = datasets.Features.from_arrow_schema(content.schema) if has_features else {}
    return _filled(content.to_pylist()), _class_names(features)


def _filled(rows: list[dict[str, Any]]) -> Rows:
    """Numbers a table's rows, and drops the nulls that Arrow adds for keys of other rows."""
    return [
        (number, {key: _without_nulls(value) for key, value in row.items()})
        for number, row in enumerate(rows, 1)
    ]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _class_names(features: Any) -> dict[str, list[str]]:
    import datasets

    of_items = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
    kinds = {name: kind for name, kind in of_items.items() if isinstance(kind, datasets.ClassLabel)}
    return {name: list(kind.names) for name, kind in kinds.items()}


def _hub(name: str) -> Table:
    """Reads a split of a hub data set, by default "train"."""
    import datasets

    match = HUB_NAME.fullmatch(name)
    if match is None or name.startswith("."):
        raise DataError(
            f"there is no data {name!r}: expected a file, or a hub data set as org/set or "
            "org/set:split"
        )
    path, config, part = match["path"], match["config"], match["split"]
    if config is not None and part is None:
        config, part = None, config
    datasets.disable_progress_bars()
    content = datasets.load_dataset(path, config, split=part or "train")
    return _filled(content.to_list()), _class_names(content.features)


READERS: dict[str, Callable[[IO[bytes]], Table]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".txt": _lines,
    ".parquet": _parquet,
}
"""How a file's name ends → what reads it."""
