"""What takes long: a `lorakin` command in a process of its own, which outlives the page.

Its output is a log, and it holds the log's lock while it lives: so the page, started again, knows
which commands still run without keeping a list.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lorakin.errors import OutputError, StateError
from lorakin.storage import locks
from lorakin.terminal import command
from lorakin.training.run_files import LOCK
from lorakin.ui import runs

FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
HOLDER = re.compile(r"process (\d+) on (.+)")


def start(words: Sequence[str], log: Path) -> None:
    """Starts `lorakin WORDS`, whose output is appended to the file `log`.

    Raises:
        OutputError: the log cannot be written, or a command that was started earlier writes it.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(log, FLAGS, 0o666)
    except OSError as error:
        raise OutputError(f"cannot write {log}: {error.strerror or error}") from error
    try:
        locks.hold(fd)
        os.write(fd, f"{runs.PROMPT}{command(*words)}\n".encode())
        # A session of its own: what ends the page's terminal does not end it.
        subprocess.Popen(
            [sys.executable, "-m", "lorakin", *words],
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            start_new_session=True,
        )
    except locks.LockTaken:
        raise OutputError(
            f"{log.parent} is in use: a command that was started before is still at work. Wait "
            "until it has ended, or choose another directory"
        ) from None
    except OSError as error:
        raise OutputError(f"cannot write {log}: {error.strerror or error}") from error
    finally:
        os.close(fd)


def lives(log: Path) -> bool:
    """Returns whether the command that writes a log is still at work."""
    return locks.holder(log) is not None


def interrupt(folder: Path) -> None:
    """Interrupts the process that works in a run's directory, as Ctrl-C on its terminal does.

    Raises:
        StateError: none does, or it runs on another machine.
    """
    holder = HOLDER.fullmatch(locks.holder(folder / LOCK) or "")
    if holder is None:
        raise StateError(f"nothing runs in {folder}, so there is nothing to pause")
    if holder[2] != platform.node():
        raise StateError(f"{folder} is at work on {holder[2]}; pause it there")
    os.kill(int(holder[1]), signal.SIGINT)
