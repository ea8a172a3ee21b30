"""Locks between processes: one holder at a time, free when it ends, and no file left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lorakin.errors import LorakinWarning
from lorakin.storage import locks

children = multiprocessing.get_context("fork")


def hold_until_told(path: Path, ready: Any) -> None:
    kept = locks.acquire(path)
    ready.send(os.getpid())
    time.sleep(60)
    kept.release()


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A process that holds `tmp_path/lock`."""
    ready, send = children.Pipe(duplex=False)
    child = children.Process(target=hold_until_told, args=(tmp_path / "lock", send))
    child.start()
    ready.recv()
    yield child
    child.kill()
    child.join()


def test_one_at_a_time_until_its_process_is_killed(holder: Any, tmp_path: Path) -> None:
    with pytest.raises(locks.LockTaken, match=f"process {holder.pid} on "):
        locks.acquire(tmp_path / "lock")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    locks.acquire(tmp_path / "lock", wait=5).release()
    assert not list(tmp_path.iterdir())


def test_a_child_does_not_hold_what_its_parent_held(tmp_path: Path) -> None:
    """A worker that was forked outlives a parent that was killed; the lock must not."""
    parent_sends, here = children.Pipe()

    def parent() -> None:
        lock = locks.acquire(tmp_path / "lock")
        if (grandchild := os.fork()) == 0:
            time.sleep(30)
            os._exit(0)
        here.send(grandchild)
        time.sleep(60)
        lock.release()

    child = children.Process(target=parent)
    child.start()
    grandchild = parent_sends.recv()
    try:
        with pytest.raises(locks.LockTaken):
            locks.acquire(tmp_path / "lock")
        child.kill()
        child.join()
        locks.acquire(tmp_path / "lock").release()
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_of_one_process_too(tmp_path: Path) -> None:
    with locks.locked(tmp_path / "lock"):
        with pytest.raises(locks.LockTaken):
            locks.acquire(tmp_path / "lock")
    kept = locks.acquire(tmp_path / "lock")
    del kept
    locks.acquire(tmp_path / "lock").release()


def test_threads_take_turns(tmp_path: Path) -> None:
    """The file goes with each holder, and a waiter that has the old one open does not take it for
    the lock.
    """
    inside, most = [0], [0]

    def turns() -> None:
        for _ in range(30):
            with locks.locked(tmp_path / "lock", wait=30):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                inside[0] -= 1

    threads = [threading.Thread(target=turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_lock", no_locks)
    with pytest.warns(LorakinWarning, match="locks"):
        locks.acquire(tmp_path / "lock").release()
    with pytest.raises(FileNotFoundError):
        locks.acquire(tmp_path / "nowhere" / "lock")


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"symbolic links|ELOOP"):
        locks.acquire(tmp_path / "lock")
    assert (tmp_path / "precious").read_text() == "mine"
