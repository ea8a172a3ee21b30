"""Readers beside writers: each read is one save, whole, and changes nothing.

`LORAKIN_READS=50000` reads more often than usual.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorakin as lk
import soak
from conftest import randomise, tiny_llama
from lorakin.storage import atomic, directory

READS = soak.count("LORAKIN_READS", 3000)
NAMES = ("a", "b", "c", "d")

children = multiprocessing.get_context("fork")


def write_for_ever(path: Path, number: int, writers: int) -> None:
    """Save after save; every other one has no `d`."""
    while True:
        number += writers
        files = {
            name: f"{number} {name} {'x' * (number % 7 * 1000)}".encode()
            for name in NAMES[: 4 - number % 2]
        }
        atomic.write(path, files, without=NAMES[4 - number % 2 :])


@contextlib.contextmanager
def running(*targets: tuple[Any, ...]) -> Iterator[None]:
    processes = [
        children.Process(target=target, args=args, daemon=True) for target, *args in targets
    ]
    for process in processes:
        process.start()
    try:
        yield
        assert all(process.is_alive() for process in processes), "no writer failed"
    finally:
        for process in processes:
            process.kill()
            process.join()


def whole(found: dict[str, bytes]) -> int | None:
    """The save that these files are of, or None if they are of several."""
    numbers = {int(content.split()[0]) for content in found.values()}
    if len(numbers) != 1 or [content.split()[1].decode() for content in found.values()] != list(
        found
    ):
        return None
    (number,) = numbers
    return number if len(found) == 4 - number % 2 else None


@pytest.mark.parametrize("writers", [1, 2])
def test_readers_beside_writers(writers: int, tmp_path: Path) -> None:
    atomic.write(tmp_path, {name: f"0 {name}".encode() for name in NAMES})
    mixed, seen = [0], set()

    def read(times: int) -> None:
        for _ in range(times):
            number = whole(atomic.read(tmp_path, NAMES))
            mixed[0] += number is None
            seen.add(number)

    with running(*((write_for_ever, tmp_path, n, writers) for n in range(writers))):
        readers = [threading.Thread(target=read, args=(READS // 3,)) for _ in range(3)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert mixed == [0] and len(seen) > 5
    soak.record(
        "Readers beside writers",
        what_is_read="files of one save",
        writers=writers,
        reads=READS // 3 * 3,
        saves_seen=len(seen),
        mixed=mixed[0],
    )


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of other ranks and methods, whose files do not go together."""
    members = [lk.LoRA(rank=2), lk.DoRA(rank=3), [lk.VeRA(rank=4), lk.DoRA()]]
    return [
        randomise(lk.adapt(tiny_llama(), member, "q_proj", seed=n)).save(
            tmp_path_factory.mktemp(f"save{n}")
        )
        for n, member in enumerate(members)
    ]


def save_for_ever(sources: list[Path], path: Path) -> None:
    contents = [{file.name: file.read_bytes() for file in source.iterdir()} for source in sources]
    every = {name for files in contents for name in files}
    while True:
        for files in contents:
            atomic.write(path, files, without=every - files.keys())


def test_an_adapter_is_read_whole_while_it_is_saved(saves: list[Path], tmp_path: Path) -> None:
    """Its tensors, its config and lorakin's part are of one save.

    No warning, no error, each of them seen.
    """
    shutil.copytree(saves[0], tmp_path / "adapter")
    reads, words = max(READS // 10, 60), set()
    with running(
        (save_for_ever, saves, tmp_path / "adapter"),
        (save_for_ever, saves[::-1], tmp_path / "adapter"),
    ):
        for _ in range(reads):
            files = directory.read(tmp_path / "adapter")
            assert files.lorakin_part is not None
            words.add(",".join(entry.member for entry in files.lorakin_part.members))
    assert words == {"lora", "dora", "vera,dora"}
    soak.record(
        "Readers beside writers",
        what_is_read="adapters",
        writers=2,
        reads=reads,
        saves_seen=len(words),
        mixed=0,
    )


def listing(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()
    }


def cut_off(folder: Path, files: dict[str, bytes], without: tuple[str, ...], at: int) -> None:
    """In a child: a save that dies at the `at`-th renaming."""
    if (child := os.fork()) == 0:
        calls, replace = iter(range(100)), os.replace
        dying: Any = lambda *args: os._exit(9) if next(calls) == at else replace(*args)  # noqa: E731
        os.replace = dying
        atomic.write(folder, files, without)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_cut_off_save_is_read_whole_and_left_as_it_is(
    at: int, saves: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(saves[2], folder)
    old, new = listing(folder), {file.name: file.read_bytes() for file in saves[0].iterdir()}
    cut_off(folder, new, ("lorakin.safetensors",), at)
    folder.chmod(0o555)
    before = listing(folder)
    assert before != old
    adapter = lk.load(tiny_llama(), folder)
    assert adapter.method.words == "lora" and len(adapter.parameters()) == 4
    assert listing(folder) == before, "who reads changes nothing"
    folder.chmod(0o755)
    atomic.write(folder, {"other": b"x"})
    assert {name: content for name, (_, _, content) in listing(folder).items()} == {
        **new,
        "other": b"x",
    }, "a writer repairs"


def test_a_save_that_did_not_come_to_count(saves: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(saves[2], folder)
    cut_off(
        folder,
        {file.name: file.read_bytes() for file in saves[0].iterdir()},
        ("lorakin.safetensors",),
        0,
    )
    before = listing(folder)
    assert lk.load(tiny_llama(), folder).method.words == "vera,dora"
    assert listing(folder) == before


def test_another_program_writes_into_the_file_meanwhile(
    saves: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT writes into files that are there.

    The reader sees that one changed under it, and reads anew.
    """
    folder = tmp_path / "adapter"
    shutil.copytree(saves[0], folder)
    (folder / "lorakin.json").unlink()
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:50])
    looks = [0]
    mark = atomic._identity

    def looked(there: os.stat_result) -> tuple[int, ...]:
        looks[0] += 1
        if looks[0] == 5:  # two files, marked twice: they are open, and not yet read
            time.sleep(0.02)
            tensors.write_bytes(whole)
        return mark(there)

    monkeypatch.setattr(atomic, "_identity", looked)
    assert len(directory.read(folder).tensors) == 4
    monkeypatch.setattr(atomic, "TRIES", 3)
    monkeypatch.setattr(atomic, "_identity", lambda there: time.perf_counter_ns())
    with pytest.raises(lk.AdapterError):
        directory.read(folder)
    assert json.loads(config.read_text())["r"] == 2


def test_what_is_no_plain_file_is_refused(saves: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(saves[0], folder)
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(lk.AdapterError, match=r"adapter_model\.safetensors"):
        lk.load(tiny_llama(), folder)
    (folder / "adapter_model.safetensors").unlink()
    shutil.copy(saves[0] / "adapter_model.safetensors", folder)
    os.mkfifo(folder / atomic.RECORD)
    with pytest.raises(lk.AdapterError):
        lk.load(tiny_llama(), folder)


def test_two_processes_that_save_take_turns(saves: list[Path], tmp_path: Path) -> None:
    """PEFT reads names, not records.

    After a save they are of one, whatever others did that were killed.
    """
    with running((save_for_ever, saves, tmp_path), (save_for_ever, saves, tmp_path)):
        time.sleep(0.5)
    last = {file.name: file.read_bytes() for file in saves[2].iterdir()}
    atomic.write(tmp_path, last)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == last
