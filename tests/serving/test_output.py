"""A result is there whole or not at all: after a kill, on a full or read-only disk, beside others.

`LORAKIN_KILLS=200` kills more often than usual.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

import lorakin as lk
import soak
from conftest import randomise, tiny_llama
from lorakin.serving.export import export
from lorakin.serving.job import ExportRequest
from lorakin.serving.output import new_directory
from lorakin.storage import directory
from serving.words import byte_tokenizer

KILLS = soak.count("LORAKIN_KILLS", 4)
TARGETS = ("merged", "lora", "gguf", "gguf-merged")

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["lorakin.serving.export", "lorakin.cli.app"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several shards, `model`, and an adapter of it, `adapter`."""
    place = tmp_path_factory.mktemp("base")
    model = tiny_llama(vocab_size=320, initializer_range=0.2, tie_word_embeddings=False)
    model.save_pretrained(place / "model", max_shard_size="50KB")
    byte_tokenizer().save_pretrained(place / "model")
    randomise(lk.adapt(model, lk.LoRA(rank=4))).save(place / "adapter")
    return place


def order(base: Path, to: str, out: Path) -> ExportRequest:
    return ExportRequest(str(base / "adapter"), to, str(out), str(base / "model"), verify=False)


def serve(what: ExportRequest) -> None:
    """In a child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(what)


def start(what: ExportRequest) -> Any:
    child = children.Process(target=serve, args=(what,))
    child.start()
    return child


def interrupted(base: Path, out: Path, writes: Any) -> None:
    """In a child: `lorakin merge`, which says that it writes and goes on for a minute."""
    from lorakin.cli import main
    from lorakin.serving.targets import MergedModel

    def write(*_: Any) -> None:
        writes.set()
        time.sleep(60)

    MergedModel.write = staticmethod(write)  # type: ignore[method-assign]
    order = ["-a", str(base / "adapter"), "-m", str(base / "model"), "-o", str(out)]
    sys.argv = ["lorakin", "merge", *order, "--no-verify"]
    main()


def test_an_end_from_outside_leaves_nothing(base: Path, tmp_path: Path) -> None:
    writes = children.Event()
    child = children.Process(target=interrupted, args=(base, tmp_path / "out", writes))
    child.start()
    assert writes.wait(120)
    child.terminate()
    child.join(30)
    assert child.exitcode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_killed_at_any_moment(base: Path, tmp_path: Path) -> None:
    """What is there is the whole model or none, and the next export leaves nothing of those that
    were killed.
    """
    chance, whole = random.Random(7), 0
    begun = time.monotonic()
    for to in TARGETS:
        serve(order(base, to, tmp_path / f"whole-{to}"))
    usual = (time.monotonic() - begun) / len(TARGETS)
    start(
        order(base, "merged", tmp_path / "out-first")
    ).join()  # so that all that is imported is there
    expected = {to: contents(tmp_path / f"whole-{to}") for to in TARGETS}
    for number in range(KILLS):
        to = TARGETS[number % len(TARGETS)]
        out = tmp_path / f"out{number}"
        child = start(order(base, to, out))
        while not any(
            path.name.startswith(".lorakin-") or path == out for path in tmp_path.iterdir()
        ):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 4 * usual))
        child.kill()
        child.join()
        if out.exists():
            whole += 1
            assert contents(out) == expected[to]
        assert all(p.name.startswith((".lorakin-", "out", "whole-")) for p in tmp_path.iterdir()), (
            "nothing else to be seen"
        )
    child = start(order(base, "merged", tmp_path / "last"))
    child.join()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    soak.record(
        "Exports killed with SIGKILL",
        kills=KILLS,
        were_through=whole,
        half_a_model=0,
        left_behind=0,
    )


def contents(folder: Path) -> dict[str, int]:
    """But for the report and the card, which name where it lies."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("export.json", "README.md")
    ]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


@contextlib.contextmanager
def most_bytes(limit: int) -> Iterator[None]:
    """Files cannot grow further, which fails as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("limit", [0, 10, 300, 1_500, 6_000, 20_000, 45_000])
def test_a_full_disk_is_said_in_a_sentence(to: str, limit: int, base: Path, tmp_path: Path) -> None:
    whole = max((path.stat().st_size for path in (base / "model").iterdir()), default=0)
    assert whole > 45_000
    with most_bytes(limit), contextlib.suppress(lk.OutputError) as _, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(order(base, to, tmp_path / "out"))
        assert contents(tmp_path / "out") and max(contents(tmp_path / "out").values()) <= limit
    if not (tmp_path / "out").exists():
        assert not list(tmp_path.iterdir())


def test_a_place_that_is_read_only(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(lk.OutputError, match="/proc/lorakin/out"):
        export(order(base, "merged", Path("/proc/lorakin/out")))

    def read_only(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(lk.OutputError, match="Read-only"):
        with new_directory(str(tmp_path / "out")):
            pass


def test_a_living_neighbour_is_left_alone(tmp_path: Path) -> None:
    with new_directory(str(tmp_path / "one")) as one:
        (one / "config.json").write_text("{}")
        with new_directory(str(tmp_path / "two")) as two:
            (two / "config.json").write_text("[]")
        assert (one / "config.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o755


def test_nothing_of_a_users_own_is_taken_for_a_leftover(tmp_path: Path) -> None:
    kept = [".lorakin-mine.lock", ".lorakin-save.json", "lorakin-0123456789ab.lock"]
    for name in kept:
        (tmp_path / name).write_text("mine")
        (tmp_path / name).with_suffix("").mkdir()
    precious = tmp_path / "precious"
    precious.mkdir()
    (tmp_path / ".lorakin-0123456789ab.lock").touch()
    (tmp_path / ".lorakin-0123456789ab").symlink_to(precious)
    with new_directory(str(tmp_path / "out")) as partial:
        (partial / "x").touch()
    assert precious.is_dir()
    assert all(
        (tmp_path / name).read_text() == "mine" and (tmp_path / name).with_suffix("").is_dir()
        for name in kept
    )
    with pytest.raises(lk.OutputError):
        with new_directory(str(tmp_path / "out")):
            pass


def test_an_export_is_of_one_save(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is saved anew once the export has begun: what is written, and compared with, is
    the one that was.
    """
    shutil.copytree(base / "adapter", tmp_path / "adapter")
    read, times = directory.read, [0]

    def read_and_save(path: Path) -> Any:
        files = read(path)
        times[0] += 1
        if path == tmp_path / "adapter":
            model = transformers.AutoModelForCausalLM.from_pretrained(base / "model")
            randomise(lk.adapt(model, lk.LoRA(rank=4)), seed=times[0] + 5).save(path)
        return files

    monkeypatch.setattr(directory, "read", read_and_save)
    for to in ("merged", "gguf-merged"):
        what = dataclasses.replace(
            order(tmp_path, to, tmp_path / to), model=str(base / "model"), verify=True
        )
        done = export(what)
        assert done.agreement is not None
    assert times == [2], "each has read it once"
