"""Files as rows: every value as the file says it, and one sentence about a file that is none."""

from __future__ import annotations

import gzip
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import lorakin as lk
from lorakin.training import data_files
from lorakin.training.contents import Conversation, PlainText
from lorakin.training.reading import DataRows, read_rows, split, unused

Write = Callable[..., str]


def texts(rows: DataRows) -> list[Any]:
    return [record.content for record in rows.records]


@pytest.mark.parametrize(
    "cell",
    [
        "02108",
        "1.10",
        "007",
        "NA",
        "null",
        "None",
        "nan",
        "1945-09-02",
        "12345678901234567890",
        "true",
        "1e5",
        " a ",
        "=1",
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_cell_keeps_its_characters(cell: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    separator = {".csv": ",", ".tsv": "\t"}.get(suffix)
    row = {"prompt": f"q {cell}", "completion": cell}
    if separator:
        path.write_text(f"prompt{separator}completion\nq {cell}{separator}{cell}\n")
    elif suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert texts(read_rows(str(path))) == [PlainText(f"q {cell}", cell)]


@pytest.mark.parametrize(
    "number", ["1.10", "12345678901234567890", "1e5", "-0.0", "100000000000000000000000.5"]
)
def test_a_number_in_json_is_written_as_it_was(number: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "q", "completion": {number}}}\n')
    assert texts(read_rows(str(tmp_path / "rows.jsonl"))) == [PlainText("q", number)]


def test_dates_of_a_table_are_written_as_days(tmp_path: Path) -> None:
    import datetime

    rows = [{"prompt": "when?", "completion": datetime.date(1969, 7, 20)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert texts(read_rows(str(tmp_path / "rows.parquet"))) == [PlainText("when?", "1969-07-20")]


def test_a_key_or_a_type_that_comes_late_is_no_error(write_rows: Write) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"q{n}", "completion": "a" * 200} for n in range(20_000)
    ]
    rows[19_000] |= {"extra": {"deep": [1]}, "completion": 7}
    found = read_rows(write_rows(rows))
    assert texts(found)[19_000] == PlainText("q19000", "7")
    assert unused(found) == "not used: extra (in 1 rows)"


def test_content_that_changed_is_read_whatever_the_files_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for answer in ("old", "new"):
        path.write_text(json.dumps({"prompt": "q", "completion": answer}) + "\n")
        os.utime(path, (1, 1))
        assert texts(read_rows(str(path))) == [PlainText("q", answer)]


@pytest.mark.parametrize(
    "name",
    ["rows[1].jsonl", "rows*.jsonl", "a?b.jsonl", "a b.jsonl", "ä.jsonl", "{x}.jsonl", "a.b.jsonl"],
)
def test_a_path_is_a_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows1.jsonl").write_text('{"prompt": "q", "completion": "other"}\n')
    (tmp_path / name).write_text('{"prompt": "q", "completion": "own"}\n')
    assert texts(read_rows(str(tmp_path / name))) == [PlainText("q", "own")]


def test_local_files_need_no_network(write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert len(read_rows(write_rows([{"text": "a"}]))) == 1


@pytest.mark.parametrize(
    "name",
    [
        "rows.jsonl.gz",
        "rows.ndjson",
        "rows.csv.gz",
        "rows.txt",
        "rows.JSONL",
        "rows.txt.gz",
        "rows.json",
    ],
)
def test_kinds_are_told_by_name(name: str, tmp_path: Path) -> None:
    content = {"csv": "text\nhello\n", "txt": "hello\n\n"}.get(
        name.split(".")[1], '{"text": "hello"}\n'
    ).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert texts(read_rows(str(tmp_path / name))) == [PlainText("", "hello")]


def test_one_object_over_many_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    for content in (json.dumps(rows, indent=1), json.dumps({"data": rows}, indent=1)):
        (tmp_path / "a.json").write_text(content)
        assert texts(read_rows(str(tmp_path / "a.json"))) == [
            PlainText("a", "b"),
            PlainText("c", "d"),
        ]
    (tmp_path / "a.json").write_text(json.dumps(rows[0], indent=1))
    assert texts(read_rows(str(tmp_path / "a.json"))) == [PlainText("a", "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"[" * 48_000, "nesting|recursion|RecursionError|depth"),
        ("a.jsonl", b'{"a":' * 48_000, "nesting|recursion|depth"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), r"jsonl\.gz"),
        ("a.csv", b"PAR1....", "Parquet"),
        ("a.jsonl.gz", b"PACKED", "unfolds"),
        ("a.csv", b"a,a\n1,2\n", "column"),
        ("a.csv", b"prompt,completion\n1,2\n1\n", "row 2"),
        ("a.csv", b"prompt|completion\n1|2\n", r"separated by '\\|'"),
        ("a.csv", b'prompt,completion\n"a" b,c\n', "line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2"),
        ("a.parquet", b"PAR1" + bytes(100), "cannot"),
        ("a.jsonl", b'{"text": ' + b"1" * 10_000 + b"}", "cannot"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_one_sentence(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(
        gzip.compress(bytes(300 << 20), 1) if content == b"PACKED" else content
    )
    begun = time.monotonic()
    with pytest.raises(lk.DataError, match=message) as refused:
        read_rows(str(tmp_path / name))
    assert "\n" not in str(refused.value)
    assert time.monotonic() - begun < 20


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(lk.DataError):
        read_rows(str(tmp_path / "rows.jsonl"))


def test_a_table_that_unfolds_into_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pyarrow.table({"text": pyarrow.nulls(10_000_000, pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    monkeypatch.setattr(data_files, "MOST_UNPACKED", 1 << 20)
    with pytest.raises(lk.DataError, match="10,000,000"):
        read_rows(str(tmp_path / "rows.parquet"))


def test_classes_of_a_table_that_are_none(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    for label, message in (
        (-1, "row 2: label -1 is none of the classes 0 to 1"),
        (None, "row 2: label is null"),
    ):
        rows = [{"text": "a", "label": 0}, {"text": "b", "label": label}, {"text": "c", "label": 1}]
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
        path = str(tmp_path / "a.parquet")
        with pytest.raises(lk.DataError, match=message):
            [record.label() for record in read_rows(path).records]


def test_row_numbers_are_the_files_own(write_rows: Write) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"q{n}"}]} for n in range(40)
    ]
    rows[29]["messages"][0]["content"] = {"a": 1}
    with pytest.raises(lk.DataError, match="row 30"):
        read_rows(write_rows(rows))
    held = split(read_rows(write_rows(rows[:29])), 0.3, seed=0)[1]
    assert all(
        record.content.messages[0]["content"] == f"q{record.number - 1}" for record in held.records
    )  # type: ignore[union-attr]


def test_several_files_of_several_formats(write_rows: Write) -> None:
    one = write_rows([{"prompt": "a", "completion": "b"}], "one.jsonl")
    two = write_rows(
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        "two.jsonl",
    )
    rows = read_rows([one, two])
    assert rows.formats == ["prompt/completion", "messages"]
    assert isinstance(texts(rows)[1], Conversation)
    labelled = write_rows([{"text": "a", "label": 1}], "three.jsonl")
    with pytest.raises(lk.DataError):
        read_rows([one, labelled])


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", '{"text": "a"}\nnot JSON\n'), ("a.csv", "a,b\n1,2\n3\n")],
)
def test_what_cannot_be_read_is_named_with_its_file(
    name: str, content: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(lk.DataError, match=rf"{name}.* (line|row) 2"):
        read_rows(str(tmp_path / name))


def test_names_of_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(path: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((path, config, split))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("org/set", "org/set:test", "org/set:main:test", "set:train[:10%]"):
        assert len(read_rows(name)) == 1
    assert asked == [
        ("org/set", None, "train"),
        ("org/set", None, "test"),
        ("org/set", "main", "test"),
        ("set", None, "train[:10%]"),
    ]
    for name in ("no such/thing/here", "../rows", "a//b", "a/b/c"):
        with pytest.raises(lk.DataError):
            read_rows(name)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.tsv",
            'prompt\tcompletion\n"Hello\tthere"\nb\tso "c\n',
            [PlainText('"Hello', 'there"'), PlainText("b", 'so "c')],
        ),
        ("a.tsv", 'prompt\tcompletion\n"say ""a"""\tb\n', [PlainText('say "a"', "b")]),
        ("a.tsv", 'prompt\tcompletion\n"a\tb"\t"c\nd"\n', [PlainText("a\tb", "c\nd")]),
        ("a.csv", "prompt;completion\na;b\n", [PlainText("a", "b")]),
        ("a.csv", "prompt, completion,,\na,b,,\n", [PlainText("a", "b")]),
        ("a.csv", '\ufeffprompt,completion\r\na,"b\nc"\r\n', [PlainText("a", "b\nc")]),
    ],
)
def test_tables_as_programs_write_them(
    name: str, content: str, expected: list[PlainText], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert texts(read_rows(str(tmp_path / name))) == expected
    (tmp_path / name).write_bytes(content.lstrip("\ufeff").encode("utf-16"))
    assert texts(read_rows(str(tmp_path / name))) == expected


def test_headers_in_other_letters_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Prompt,Completion\na,b\n")
    with pytest.raises(lk.DataError, match="--columns"):
        read_rows(str(tmp_path / "a.csv"))


def test_a_list_of_rows_beside_other_things(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": [{"text": "a"}]}, indent=1))
    assert texts(read_rows(str(tmp_path / "a.json"))) == [PlainText("", "a")]
    (tmp_path / "a.jsonl").write_text('{"text": NaN}\n')
    with pytest.raises(lk.DataError, match="JSON"):
        read_rows(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a", "label": true}\n{"text": "b", "label": false}\n'
    )
    assert read_rows(str(tmp_path / "a.jsonl")).labels() == ["False", "True"]
