"""Data files and hub data sets as rows, with every value as it stands there.

Files are read by Python's own `json` and `csv` and by pyarrow: nothing is cached, nothing is fetched, no
cell is guessed to be a number or a date.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import gzip
import io
import json
import os
import random
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lorakin.errors import DataError
from lorakin.storage import paths
from lorakin.training import formats
from lorakin.training.formats import CLASSIFICATION, Content, Format, Number, label_text

HOLDOUT_LIMIT = 256
LONGEST_CELL = 1 << 27
"""Characters of one CSV cell; Python's own limit of 131,072 is less than a long document has."""
MOST_UNPACKED, MOST_RATIO = 1 << 28, 200
"""A gzip or Parquet file may unfold into so many bytes, or into so many times its own size if that is more."""
HUB_NAME = re.compile(
    r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?(:(?P<split>[^:\[\]]+(\[[^\]]*\])?))?"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A file or hub data set: its name, its format, and the names of its classes where it has them."""

    name: str
    format: Format
    label_names: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """A row as it was read: its columns, where it stands (counted from 1), and what it says."""

    source: Source
    number: int
    values: Mapping[str, Any]
    content: Content

    @property
    def where(self) -> str:
        """The row's place, for messages."""
        return f"{self.source.name}, row {self.number}"

    def label(self) -> str:
        """The name of its class.

        Raises:
            DataError: it has none.
        """
        value = self.content.label if isinstance(self.content, formats.Labelled) else None
        names = self.source.label_names
        if names is not None:
            if not isinstance(value, int) or not 0 <= value < len(names):
                raise DataError(
                    f"{self.where}: label {value!r} is none of the classes 0 to {len(names) - 1}; remove such rows"
                )
            return names[value]
        if not isinstance(value, str | int | float) or value != value or not _is_class(value):
            raise DataError(
                f"{self.where}: label {repr(value)[:80]} is no class; expected text or whole numbers"
            )
        return label_text(value)


@dataclasses.dataclass(frozen=True)
class DataRows:
    """Data as it was read, from one source or several.

    `left_out` counts rows that say themselves that they are not to be learned; `unused` are keys that no
    format reads, with the number of rows that have them.
    """

    name: str
    records: list[Record]
    left_out: int = 0
    unused: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def formats(self) -> list[str]:
        """The formats of its sources, each once."""
        return list(dict.fromkeys(record.source.format.name for record in self.records))

    @property
    def is_classification(self) -> bool:
        """Whether each row is a text and its class."""
        return self.formats == [CLASSIFICATION]

    def labels(self) -> list[str]:
        """The classes, in order.

        Raises:
            DataError: missing labels, labels that are no classes, or fewer than two classes.
        """
        given = {record.source.name: record.source.label_names for record in self.records}
        if named := [names for names in given.values() if names is not None]:
            return list(dict.fromkeys(name for names in named for name in names))
        found = {record.label() for record in self.records}
        if len(found) < 2:
            raise DataError(
                f"{self.name}: all {len(self)} rows have the same label {next(iter(found))!r}"
            )
        kinds = {
            isinstance(r.content.label, str | bool)
            for r in self.records
            if isinstance(r.content, formats.Labelled)
        }
        if len(kinds) > 1:
            raise DataError(f"{self.name}: some labels are text and some are numbers; use one kind")
        return sorted(found) if kinds == {True} else sorted(found, key=int)


def read_rows(
    names: str | Sequence[str], columns: Mapping[str, str] | None = None, layout: str | None = None
) -> DataRows:
    """Read data files or hub data sets, and see what their rows say.

    Args:
        names: one or several: a file whose name ends in .jsonl, .ndjson, .json, .csv, .tsv, .txt or .parquet,
            perhaps with .gz after it; or a hub data set, as org/set, org/set:split or org/set:config:split.
        columns: a format's column → the column that stands for it in the data. With it, other columns are left aside.
        layout: the name of the format; by default it is detected.

    Raises:
        DataError: nothing there, unreadable, no rows, columns of no known format, or a row that cannot be used as
            it is.
    """
    if layout is not None and layout not in formats.NAMES:
        raise DataError(f"format must be one of {', '.join(formats.NAMES)}, not {layout!r}")
    parts = [
        _read_one(name, columns or {}, layout)
        for name in ([names] if isinstance(names, str) else names)
    ]
    joined = ", ".join(part.name for part in parts)
    if len({part.is_classification for part in parts}) > 1:
        kinds = "; ".join(f"{part.name} has format {part.formats[0]}" for part in parts)
        raise DataError(f"data of a classifier and of a language model cannot be mixed: {kinds}")
    unused: collections.Counter[str] = collections.Counter()
    for part in parts:
        unused.update(part.unused)
    return DataRows(
        joined,
        [r for part in parts for r in part.records],
        sum(part.left_out for part in parts),
        unused,
    )


def _read_one(name: str, columns: Mapping[str, str], layout: str | None) -> DataRows:
    numbered, label_names = _table(name)
    if not numbered:
        raise DataError(f"data {name!r} has no rows")
    if columns:
        numbered = [(number, _mapped(name, number, row, columns)) for number, row in numbered]
    values = [row for _, row in numbered]
    found = formats.detected(values, name, layout)
    source = Source(name, found, label_names.get(columns.get(found.columns[-1], found.columns[-1])))
    records = []
    for number, row in numbered:
        try:
            if not formats.is_left_out(row):
                records.append(
                    Record(source, number, row, formats.read(found, row, mapped=bool(columns)))
                )
        except DataError as error:
            raise DataError(
                f"{name}, row {number}: {error} (format {found.name}). The row: {shown(row)}"
            ) from None
    if not records:
        raise DataError(
            f"data {name!r}: all {len(values)} rows say that they are not to be learned"
        )
    return DataRows(name, records, len(values) - len(records), formats.unused_keys(found, values))


def _mapped(
    name: str, number: int, row: Mapping[str, Any], columns: Mapping[str, str]
) -> dict[str, Any]:
    if missing := [source for source in columns.values() if source not in row]:
        raise DataError(
            f"{name}, row {number}: there is no column {missing[0]!r}; there are {', '.join(map(str, row))}"
        )
    return {target: row[source] for target, source in columns.items()}


def shown(row: Mapping[str, Any]) -> str:
    """A row for a message, at most 200 characters of it."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:199] + "…"


def split(rows: DataRows, share: float, seed: int) -> tuple[DataRows, DataRows]:
    """Set apart `share` of the rows, at least one and at most 256, chosen by `seed`; both parts keep the order.

    Raises:
        DataError: there are fewer than two rows.
    """
    count = len(rows)
    if count < 2:
        raise DataError(
            f"{rows.name}: {count} row is too few to set one apart; give held-out rows with --eval-data"
        )
    held = set(
        random.Random(seed).sample(
            range(count), min(max(1, round(share * count)), HOLDOUT_LIMIT, count - 1)
        )
    )
    train = [record for at, record in enumerate(rows.records) if at not in held]
    test = [record for at, record in enumerate(rows.records) if at in held]
    return dataclasses.replace(rows, records=train), dataclasses.replace(rows, records=test)


def summary(rows: DataRows) -> str:
    """One line about the rows: how many, of which format, and the classes with their counts."""
    line = f"{len(rows):,} rows, format {' and '.join(rows.formats)}"
    if rows.is_classification:
        counts = collections.Counter(record.label() for record in rows.records)
        line += ": " + ", ".join(f"{value!r} × {count:,}" for value, count in counts.most_common(8))
    if rows.left_out:
        line += f"; {rows.left_out:,} more are left out, as they say themselves"
    return line


def unused(rows: DataRows) -> str | None:
    """What the rows hold that is not read, in words; None if there is nothing."""
    if not rows.unused:
        return None
    return "not used: " + ", ".join(
        f"{key} (in {count:,} rows)" for key, count in rows.unused.items()
    )


# a row's number in its file (from 1) and its columns; and the names of classes of those columns that have some
Table = tuple[list[tuple[int, dict[str, Any]]], dict[str, list[str]]]


def _table(name: str) -> Table:
    path = paths.named(name, "--data", DataError)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = (
        suffixes[-2]
        if suffixes[-1:] == [".gz"] and len(suffixes) > 1
        else (suffixes[-1:] or [""])[0]
    )
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
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise DataError(f"data {str(path)!r} is no file")
    if reader is None:
        raise DataError(
            f"data {str(path)!r}: expected a file ending in {', '.join(READERS)}, perhaps with .gz after it"
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
            f"data {str(path)!r} unfolds into more than {most:,} bytes; unpack it yourself if it is meant"
        )
    return content


def _json_lines(file: IO[bytes]) -> Table:
    """A JSON object on each line; or one JSON array of objects, as .json files hold."""
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
    """One object over many lines: a row, or what holds a list of rows."""
    found = _object(_parsed(content, "line 1"), "line 1")
    lists = [
        value
        for value in found.values()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if len(lists) == 1 and not any(
        set(layout.columns) <= found.keys() for layout in formats.FORMATS
    ):
        return _objects(lists[0]), {}
    return [(1, found)], {}


def _objects(content: Any) -> list[tuple[int, dict[str, Any]]]:
    return [(number, _object(row, f"row {number}")) for number, row in enumerate(content, 1)]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where} cannot be read as a row: it holds {json.dumps(value, default=str)[:80]}, expected an object"
        )
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
    """A JSON number without a fraction; -0 stays what it is."""
    return number if str(number := int(literal)) == literal else Number(literal)


def _no_number(literal: str) -> float:
    raise ValueError(f"{literal} is no number of JSON")


def _separated(delimiter: str) -> Callable[[IO[bytes]], Table]:
    def read(file: IO[bytes]) -> Table:
        limit = csv.field_size_limit(LONGEST_CELL)
        try:
            text = _decoded(file.read())
            first = text.partition("\n")[0]
            mark = ";" if delimiter == "," and "," not in first and ";" in first else delimiter
            if mark == "\t" and (rows := _unquoted(text)) is not None:
                return rows, {}
            return _cells(
                csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
            ), {}
        finally:
            csv.field_size_limit(limit)

    return read


def _decoded(content: bytes) -> str:
    """A text in UTF-8, or in UTF-16 if it begins with that mark, as Excel writes it."""
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def _unquoted(text: str) -> list[tuple[int, dict[str, Any]]] | None:
    """Lines of cells with tabs between, where a quote is a quote; None if cells reach over lines."""
    lines = [line.split("\t") for line in text.replace("\r\n", "\n").split("\n") if line]
    if len({len(cells) for cells in lines}) != 1:
        return None
    quoted = re.compile(r'"(?:[^"]|"")*"')
    plain = [
        [c[1:-1].replace('""', '"') if quoted.fullmatch(c) else c for c in cells] for cells in lines
    ]
    return _cells(iter(plain))


def _cells(reader: Any) -> list[tuple[int, dict[str, Any]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        header = [name.strip() for name in next(reader, [])]
        named = len(header) - next(
            (n for n, name in enumerate(reversed(header)) if name), len(header)
        )
        if twice := [name for name in header[:named] if header.count(name) > 1]:
            raise DataError(f"the column {twice[0]!r} stands in the header twice")
        for number, cells in enumerate((cells for cells in reader if cells), 1):
            if len(cells) != len(header) or any(cells[named:]):
                raise DataError(
                    f"row {number} has {len(cells)} cells, and the header {named}: {str(cells)[:120]}"
                )
            rows.append((number, dict(zip(header[:named], cells[:named], strict=True))))
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num}: {error}; is a quote missing, or another separator meant?"
        ) from None
    return rows


def _lines(file: IO[bytes]) -> Table:
    lines = io.TextIOWrapper(file, encoding="utf-8-sig")
    return [
        (number, {"text": line.rstrip("\n")})
        for number, line in enumerate(lines, 1)
        if line.strip()
    ], {}


def _parquet(file: IO[bytes]) -> Table:
    import datasets
    import pyarrow.parquet

    stored = pyarrow.parquet.ParquetFile(file).metadata
    cells, held = (
        stored.num_rows * stored.num_columns,
        sum(stored.row_group(n).total_byte_size for n in range(stored.num_row_groups)),
    )
    if max(cells, held) > max(MOST_UNPACKED, MOST_RATIO * file.seek(0, os.SEEK_END)):
        raise DataError(
            f"the table unfolds into {cells:,} cells of {held:,} bytes; keep the rows that are meant"
        )
    table = pyarrow.parquet.read_table(file)
    said = (table.schema.metadata or {}).get(b"huggingface")
    features = datasets.Features.from_arrow_schema(table.schema) if said is not None else {}
    return _filled(table.to_pylist()), _class_names(features)


def _filled(rows: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """A table's rows, without the nulls that Arrow puts inside objects for keys which other rows have."""
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

    return {
        name: list(kind.names)
        for name, kind in features.items()
        if isinstance(kind, datasets.ClassLabel)
    }


def _hub(name: str) -> Table:
    """The split of a hub data set, by default "train"."""
    import datasets

    found = HUB_NAME.fullmatch(name)
    if found is None or name.startswith("."):
        raise DataError(
            f"there is no data {name!r}: expected a file, or a hub data set as org/set or org/set:split"
        )
    path, config, part = found["path"], found["config"], found["split"]
    if config is not None and part is None:
        config, part = None, config
    datasets.disable_progress_bars()
    table = datasets.load_dataset(path, config, split=part or "train")
    return _filled(table.to_list()), _class_names(table.features)


READERS: dict[str, Callable[[IO[bytes]], Table]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_lines, ".csv": _separated(","),
    ".tsv": _separated("\t"), ".txt": _lines, ".parquet": _parquet,
}  # fmt: skip


def _is_class(value: str | int | float) -> bool:
    return not isinstance(value, float) or (float(value).is_integer() and abs(value) < 2**53)
