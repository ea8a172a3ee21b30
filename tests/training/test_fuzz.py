"""Damaged and hostile recipes and data files: a clear error or something usable, soon, in little
memory, and no code runs.

`LORAKIN_FUZZ=10000` tries more than the usual number.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import yaml

import lorakin as lk
import soak
from lorakin.training.encoding import encode
from lorakin.training.reading import read_rows, split
from lorakin.training.recipe import Recipe
from lorakin.training.recipe_file import read_recipe
from lorakin.training.tasks import task_for

COUNT = soak.count("LORAKIN_FUZZ", 400)
LONGEST, MOST_MEMORY = 10, 500 << 20
"""Seconds that one file may take, and bytes that all of them may add to the process."""

EXECUTED = "executed"
RECIPE = {
    "model": "smollm2",
    "data": "rows.jsonl",
    "out": "adapter",
    "method": "dora,lora+",
    "rank": 8,
    "alpha": 16.0,
    "lr": "2e-4",
    "settings": {"ratio": 8},
    "targets": ["q_proj", "v_proj"],
    "layers": "0-3",
    "steps": 10,
    "batch_size": 4,
    "holdout": 0.2,
    "gradient_checkpointing": True,
    "labels": ["a", "b"],
}
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    1e308,
    float("inf"),
    float("nan"),
    10**400,
    "",
    "x" * 10_000,
    "../../etc/passwd",
    "\x00",
    "~",
    [],
    [[]],
    {},
    {"a": {}},
    "1e400",
    "0x10",
    "2020-01-01",
    "💥",
    ["q_proj", None],
    {"ratio": None},
    "lora,lora",
    "all-linear",
    b"bytes",
]
TEXTS = [
    "",
    "[" * 50_000,
    "{" * 50_000,
    "- " * 50_000,
    "model: *x",
    "a: &a [1]\nb: *a",
    "model: !!python/object/apply:os.system ['touch {}']",
    "!!python/object/new:os.system ['touch {}']",
    "model: !!python/name:os.system ''",
    "? {{a: b}}\n: c",
    "model: |\n" + " x\n" * 10_000,
    "%YAML 9.9\n---\nmodel: x",
    "\ufeffmodel: x",
    "model: x\n---\nmodel: y",
    "\x00",
    "model: x\nmodel: y",
    "<<: {{model: x}}",
    "1",
    "null",
    "!!binary aGk=",
    "model: !!timestamp 9999-99-99",
    "model: !!int 0b2",
    "model: !!float x",
    "? !!set {{a}}\n: 1",
    "model: !!omap [a]",
]
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)


class Watched:
    """Sees that each of many tries is short, and that together they leave little in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = psutil.Process()
        self.before = self.process.memory_info().rss
        self.refused = self.usable = 0
        self.longest = 0.0

    def tried(self, call: Callable[[], Any]) -> None:
        """One try: `call` ends well or with an error of ours."""
        begun = time.monotonic()
        signal.alarm(LONGEST)  # ends the process's patience, whatever it hangs in
        try:
            call()
            self.usable += 1
        except lk.LorakinError as error:
            self.refused += bool(str(error).strip())
        finally:
            signal.alarm(0)
        self.longest = max(self.longest, time.monotonic() - begun)
        assert not (self.folder / EXECUTED).exists(), "code ran"

    def record(self, of: str, least_refused: int) -> None:
        """Of all tries."""
        added = self.process.memory_info().rss - self.before
        assert added < MOST_MEMORY
        assert self.refused >= least_refused
        assert self.usable, "some are still right"
        soak.record(
            "Hostile files",
            files=of,
            tried=self.refused + self.usable,
            refused=self.refused,
            usable=self.usable,
            longest=f"{self.longest:.2f} s",
            memory_added=f"{added / 2**20:.0f} MiB",
            code_run=0,
        )


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    def out_of_patience(*_: Any) -> None:
        raise AssertionError(f"a file took more than {LONGEST} seconds")

    before = signal.signal(signal.SIGALRM, out_of_patience)
    yield Watched(tmp_path)
    signal.signal(signal.SIGALRM, before)


def flipped(content: bytes, chance: random.Random) -> bytes:
    """`content` with a few bytes changed, cut off, doubled or put in."""
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(damaged) or 1)
        what = chance.randrange(4)
        if what == 0 and damaged:
            damaged[at] = chance.randrange(256)
        elif what == 1:
            del damaged[at : at + chance.randint(1, 20)]
        elif what == 2:
            damaged[at:at] = damaged[at : at + 30]
        else:
            damaged[at:at] = bytes(
                chance.choice(
                    [b"\x00", b'"', b"{", b"]", b"\n", b"\xff\xfe", b"*a", b"&a ", b"!!", b": "]
                )
            )
    return bytes(
        damaged[: chance.randrange(len(damaged) + 1)] if chance.random() < 0.1 else damaged
    )


def test_recipes(tmp_path: Path, watched: Watched) -> None:
    chance = random.Random(5)
    file = tmp_path / "recipe.yaml"
    kinds = ["value", "text", "bytes", "unknown"]
    for number in range(COUNT):
        kind = kinds[number % len(kinds)]
        content = dict(RECIPE)
        if kind == "value":
            key = chance.choice(list(Recipe.__dataclass_fields__))
            content[key] = chance.choice(VALUES)
            file.write_text(yaml.dump(content), encoding="utf-8")
        elif kind == "unknown":
            content[chance.choice(["", "modle", "__class__", "None", "os"])] = chance.choice(VALUES)
            file.write_text(yaml.dump(content), encoding="utf-8")
        elif kind == "text":
            file.write_text(
                chance.choice(TEXTS).format(tmp_path / EXECUTED)
                if chance.random() < 0.9
                else LAUGHS
            )
        else:
            file.write_bytes(flipped(yaml.safe_dump(content).encode(), chance))
        watched.tried(lambda: read_recipe(file, {}).build())
    watched.record("recipes", COUNT // 3)


def test_aliases_and_long_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(LAUGHS)
    with pytest.raises(lk.SettingError, match="aliases"):
        read_recipe(file, {})
    file.write_text("model: x\nsteps: 1\nsteps: 2\n")
    with pytest.raises(lk.SettingError):
        read_recipe(file, {})
    file.write_text("# " + "x" * (1 << 20) + "\nmodel: x")
    with pytest.raises(lk.SettingError, match="1,048,576"):
        read_recipe(file, {})


ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {
            "messages": [
                {"role": "user", "content": "who is it"},
                {"role": "assistant", "content": "a cat"},
            ]
        }
    ]
    * 4,
    "alpaca": [{"instruction": "who", "input": "", "output": "a dog"}] * 4,
    "pairs": [{"prompt": "who", "completion": "a bird"}] * 4,
    "labelled": [{"text": "the cat sat", "label": label} for label in ("yes", "no")] * 2,
    "plain": [{"text": "the cat sat on the mat"}] * 4,
}
JUNK: list[Any] = [
    None,
    True,
    -1,
    1.5,
    10**30,
    "",
    "x" * 10_000,
    "\x00",
    [],
    {},
    [None],
    {"role": "user"},
    [[[]]],
    "💥",
    ["a", 1],
]


def test_data_files(tmp_path: Path, watched: Watched, tokenizer: Any) -> None:
    chance = random.Random(6)
    suffixes = [".jsonl", ".json", ".csv", ".tsv", ".parquet"]

    def read(path: Path) -> None:
        rows = read_rows(str(path))
        for part in split(rows, 0.3, 0):
            if rows.is_classification:
                task_for(part, rows.labels()).encode(part, tokenizer, 16)
            else:
                encode(part, tokenizer, 16)

    for number in range(COUNT // 2):
        rows = json.loads(json.dumps(ROWS[chance.choice(sorted(ROWS))]))
        suffix = suffixes[number % len(suffixes)]
        if number % 2:  # a value, a column
            row = chance.choice(rows)
            key = chance.choice(list(row))
            if isinstance(row[key], list) and chance.random() < 0.7:
                row[key][chance.randrange(len(row[key]))] = chance.choice(JUNK)
            elif chance.random() < 0.7:
                row[key] = chance.choice(JUNK)
            else:
                del row[key]
        try:
            content = written(rows, suffix)
        except (pyarrow.ArrowException, TypeError, OverflowError):  # a table holds no such thing
            continue
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(content if number % 2 else flipped(content, chance))
        watched.tried(lambda path=path: read(path))
    watched.record("data files", COUNT // 20)


def written(rows: list[dict[str, Any]], suffix: str) -> bytes:
    """The rows as a file of that kind."""
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".parquet":
        buffer = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        return bytes(buffer.getvalue())
    separator = "\t" if suffix == ".tsv" else ","
    columns = list(rows[0])
    lines = [
        separator.join(columns),
        *(separator.join(json.dumps(row.get(column)) for column in columns) for row in rows),
    ]
    return (os.linesep.join(lines) + os.linesep).encode()
