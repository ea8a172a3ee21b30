"""Locks between processes: one process holds a file at a time, and ends its hold when it ends.

The lock is the system's (`flock`), not the file's existence, so that a killed process leaves none.
Giving a lock back removes its file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

from lorakin.errors import LorakinWarning

if sys.platform == "win32":
    import msvcrt

    def _lock(fd: int) -> None:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
"""What the system says of a lock that somebody else has."""
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF}
"""What it says of a file system that has none."""
FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
OFTEN = 0.01
"""Seconds between two looks at a lock that is waited for."""


class LockTaken(Exception):
    """Somebody else has the lock; the text says who: `process 7 on machine`."""


class Lock:
    """A lock that is held until `release`, or until this object or its process is gone.

    It is not `sure` where the file system has no locks: then others may hold it, too.
    """

    def __init__(self, path: Path, fd: int, sure: bool) -> None:
        self.path, self.fd, self.process, self.sure = path, fd, os.getpid(), sure
        _locks.add(self)

    def release(self) -> None:
        """Releases the lock and removes its file; does nothing the second time."""
        if self.fd >= 0 and self.process == os.getpid():
            with contextlib.suppress(OSError):  # a directory that is gone, or read-only since
                self.path.unlink()
            self.forget()

    def forget(self) -> None:
        """Closes the file. In a process that was forked the lock stays its parent's."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.release()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_locks):
        lock.forget()


# A child that outlives this process must not hold this one's locks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def hold(path: Path, wait: float = 0.0) -> Lock:
    """Takes the lock of the file `path`, made if need be; tries for `wait` seconds.

    Where the file system has no locks that is a warning, and nothing is locked.

    Raises:
        LockTaken: somebody else holds it.
        OSError: the file cannot be made.
    """
    until = time.monotonic() + wait
    while True:
        fd, sure = os.open(path, FLAGS, 0o666), True
        try:
            _lock(fd)
        except OSError as error:
            if error.errno in HELD:
                holder = (
                    os.pread(fd, 200, 0).decode(errors="replace") if hasattr(os, "pread") else ""
                )
                os.close(fd)
                if time.monotonic() < until:
                    time.sleep(OFTEN)
                    continue
                raise LockTaken(
                    holder if holder.isprintable() and holder else "another process"
                ) from None
            if error.errno not in NO_LOCKS:
                os.close(fd)
                raise
            sure = False
            _warn(path, error)
        if _is_there(path, fd):
            with contextlib.suppress(OSError):  # of a full disk; it is only for messages
                os.ftruncate(fd, 0)
                os.write(fd, f"process {os.getpid()} on {platform.node()}".encode())
            return Lock(path, fd, sure)
        os.close(fd)  # its holder gave it back, and the file with it, since it was opened


@contextlib.contextmanager
def held(path: Path, wait: float = 0.0) -> Iterator[None]:
    """`hold` for the time of the context."""
    lock = hold(path, wait)
    try:
        yield
    finally:
        lock.release()


def _is_there(path: Path, fd: int) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd))


def _warn(path: Path, error: OSError) -> None:
    warnings.warn(
        f"the file system of {path.parent} has no locks ({error.strerror}), so nothing keeps two "
        "processes from writing there at once; see to it that only one does",
        LorakinWarning,
        stacklevel=4,
    )
