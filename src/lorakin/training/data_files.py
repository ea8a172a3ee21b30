"""Data files and hub data sets as tables: numbered rows, with every value as it stands there.

Python's `json` and `csv`, and pyarrow, read the files: nothing is cached, nothing is fetched, and
no cell is guessed to be a number or a date. Rows are read as they are asked for, where the format
allows it: a JSON array, a .tsv file and a packed .parquet file are read whole.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lorakin.errors import DataError
from lorakin.storage import paths
from lorakin.training import formats
from lorakin.training.contents import Number
from lorakin.training.separated_files import separated

MOST_UNPACKED, MOST_RATIO = 1 << 28, 200
"""Bytes that a gzip or Parquet file may unfold into; or so many times its size, if that is more."""
ROWS_AT_ONCE = 1000
"""Rows of a table that are held in memory while they are read."""
HUB_NAME = re.compile(
    r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.+-]+))?(:(?P<split>[^:\[\]]+(\[[^\]]*\])?))?"
)

Rows = list[tuple[int, dict[str, Any]]]
"""Each row's number in its file, from 1, and its columns."""
ClassNames = dict[str, list[str]]
"""A column → the names of its classes, for columns that have names."""
Opened = tuple[Iterable[tuple[int, dict[str, Any]]], ClassNames]
"""Numbered rows, read as they are asked for, and the names of classes."""


def table(name: str, most: int | None = None) -> tuple[Rows, ClassNames]:
    """Returns the rows of a data file or of a hub data set, and the names of classes.

    Args:
        name: a file, or org/set, org/set:split, org/set:config:split.
        most: how many rows are read, the first ones; None for all.

    Raises:
        DataError: nothing of that name, or it cannot be read.
    """
    with opened(name) as (rows, class_names):
        return list(itertools.islice(rows, most)), class_names


@contextlib.contextmanager
def opened(name: str, streaming: bool = False) -> Iterator[Opened]:
    """Opens a data file or hub data set within a `with` block, which reads rows from it.

    Args:
        name: as for `table`.
        streaming: whether a hub data set is read from the hub as it goes, and not stored.

    Raises:
        DataError: as `table`; also where a row is read.
    """
    path = paths.user_path(name, "--data", DataError)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"] and len(suffixes) > 1
    suffix = suffixes[-2] if packed else (suffixes[-1:] or [""])[0]
    reader = READERS.get(suffix)
    try:
        if path.exists() or reader is not None:
            with _open_file(path, reader, suffix) as file:
                yield reader(file)  # type: ignore[misc]
        else:
            yield _hub(name, streaming)
    except DataError as error:
        said = str(error)
        raise DataError(said if str(path) in said else f"data {name!r}: {said}") from None
    except Exception as error:  # parsers of files, and the hub's client, raise whatever they like
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"data {name!r} cannot be read: {reason[0]}") from error


@contextlib.contextmanager
def _open_file(
    path: Path, reader: Callable[[IO[bytes]], Opened] | None, suffix: str
) -> Iterator[IO[bytes]]:
    """Opens a file within a `with` block, unpacked, once it is known to be what its name says."""
    if not path.exists():
        raise DataError(f"there is no data file {path}")
    # Opening a pipe would wait for its writer.
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(
            f"data {str(path)!r} is not a file: give one of {', '.join(READERS)}, or several --data"
        )
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
            with gzip.GzipFile(fileobj=file) as packed:
                unpacked = io.BufferedReader(Unpacked(packed, path))
                yield io.BytesIO(unpacked.read()) if suffix == ".parquet" else unpacked
            return
        if begins[:2] == b"\x1f\x8b":
            raise DataError(f"data {str(path)!r} is packed with gzip; end its name in {suffix}.gz")
        if begins == b"PAR1" and suffix != ".parquet":
            raise DataError(f"data {str(path)!r} is a Parquet file; end its name in .parquet")
        yield file


class Unpacked(io.RawIOBase):
    """What a gzip file unfolds into, as far as that is no more than a file may hold.

    Args:
        packed: the file.
        path: its path.
    """

    def __init__(self, packed: gzip.GzipFile, path: Path) -> None:
        self.packed, self.path = packed, path
        self.most = max(MOST_UNPACKED, MOST_RATIO * os.path.getsize(path))

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to another place, as files do."""
        return self.packed.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        """Reads bytes into `buffer`.

        Raises:
            DataError: there are too many.
        """
        content = self.packed.read(len(buffer))
        if self.packed.tell() > self.most:
            raise DataError(
                f"data {str(self.path)!r} unfolds into more than {self.most:,} bytes; "
                "unpack it yourself if it is meant"
            )
        buffer[: len(content)] = content
        return len(content)


def _json_lines(file: IO[bytes]) -> Opened:
    return _objects_in(file), {}


def _objects_in(file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Reads a JSON object on each line; or one JSON array of objects, as .json files hold."""
    start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    file.seek(0)
    if start.startswith(b"["):
        yield from _objects(_parsed(file.read(), "the file"))
        return
    is_first = True
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = _object(_parsed(line, f"line {number}"), f"line {number}")
        except DataError:
            if not is_first or not start.startswith(b"{"):
                raise
            file.seek(0)
            yield from _whole(file.read())
            return
        yield number, row
        is_first = False


def _whole(content: bytes) -> Rows:
    """Reads one object over many lines: a row, or an object that holds a list of rows."""
    content_object = _object(_parsed(content, "line 1"), "line 1")
    values = [value for value in content_object.values() if isinstance(value, list) and value]
    lists = [value for value in values if isinstance(value[0], dict)]
    is_row = any(set(layout.columns) <= content_object.keys() for layout in formats.FORMATS)
    if len(lists) == 1 and not is_row:
        return _objects(lists[0])
    return [(1, content_object)]


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


def _lines(file: IO[bytes]) -> Opened:
    lines = enumerate(io.TextIOWrapper(file, encoding="utf-8-sig"), 1)
    return ((number, {"text": line.rstrip("\n")}) for number, line in lines if line.strip()), {}


def _parquet(file: IO[bytes]) -> Opened:
    import datasets
    import pyarrow.parquet

    content = pyarrow.parquet.ParquetFile(file)
    stored, schema = content.metadata, content.schema_arrow
    cells = stored.num_rows * stored.num_columns
    size = sum(stored.row_group(n).total_byte_size for n in range(stored.num_row_groups))
    if max(cells, size) > max(MOST_UNPACKED, MOST_RATIO * file.seek(0, os.SEEK_END)):
        raise DataError(
            f"the table unfolds into {cells:,} cells of {size:,} bytes; keep the rows that are "
            "meant"
        )
    has_features = b"huggingface" in (schema.metadata or {})
    features = datasets.Features.from_arrow_schema(schema) if has_features else {}
    return _filled(content.iter_batches(batch_size=ROWS_AT_ONCE)), _class_names(features)


def _filled(batches: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers a table's rows, and drops the nulls that Arrow adds for keys of other rows."""
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, 1):
        yield number, {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _class_names(features: Any) -> dict[str, list[str]]:
    import datasets

    of_items = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
    kinds = {name: kind for name, kind in of_items.items() if isinstance(kind, datasets.ClassLabel)}
    return {name: list(kind.names) for name, kind in kinds.items()}


def _hub(name: str, streaming: bool) -> Opened:
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
    content: Any = datasets.load_dataset(path, config, split=part or "train", streaming=streaming)
    batches = content.with_format("arrow").iter(batch_size=ROWS_AT_ONCE)
    return _filled(batches), _class_names(content.features or {})


READERS: dict[str, Callable[[IO[bytes]], Opened]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".csv": separated(","),
    ".tsv": separated("\t"),
    ".txt": _lines,
    ".parquet": _parquet,
}
"""How a file's name ends → what reads it."""
