"""Replacing files all or none, with a kill at every system call."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lorakin.errors import AdapterError
from lorakin.storage import atomic

OLD = {"a": b"old a", "b": b"old b", "c": b"old c"}
NEW = {name: content.replace(b"old", b"new") for name, content in OLD.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("at", range(10))
def test_killed_at_any_system_call(at: int, tmp_path: Path) -> None:
    """A child process dies at the n-th call that reaches the disk.

    The parent finds all of the old files or all of the new.
    """
    atomic.write(tmp_path, OLD)
    if (child := os.fork()) == 0:
        calls = iter(range(100))

        def dying(real: Any) -> Any:
            def call(*args: Any) -> Any:
                if next(calls) == at:
                    os._exit(9)
                return real(*args)

            return call

        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        atomic.write(tmp_path, NEW)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if at < 8 else 0)
    atomic.finish(tmp_path)
    found = {name: content for name, content in contents(tmp_path).items() if name in OLD}
    assert found == (OLD if at < 5 else NEW)
    atomic.write(tmp_path, OLD)
    assert contents(tmp_path) == OLD, "nothing else is left"


@pytest.mark.parametrize(
    "record",
    [
        {"../a": ".a.12345678.tmp"},
        {"a": "../.a.12345678.tmp"},
        {"a": "b"},
        {".hidden": "..hidden.12345678.tmp"},
        {"": ".12345678.tmp"},
        {"a": 3},
        ["a"],
        5,
        None,
        {"a/b": ".a/b.12345678.tmp"},
    ],
)
def test_a_record_names_nothing_but_temporary_files(record: Any, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    atomic.write(folder, OLD)
    (tmp_path / "a").write_bytes(b"outside")
    (folder / ".a.12345678.tmp").write_bytes(b"new")
    (folder / atomic.RECORD).write_text(json.dumps(record))
    before = contents(folder)
    with pytest.raises(AdapterError):
        atomic.finish(folder)
    assert contents(folder) == before
    assert (tmp_path / "a").read_bytes() == b"outside"
