"""Locks between processes: one process at a time holds a file, until it releases it or exits.

The lock is the system's (`flock`), not the file's existence, so a killed process leaves none.
Releasing a lock removes its file.
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

    def _lock(fd: int, is_shared: bool = False) -> None:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(fd: int, is_shared: bool = False) -> None:
        fcntl.flock(fd, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


ERRNO_LOCKED = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
"""Errors of the system for a lock that somebody else has."""
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF}
"""Errors for a file system that has no locks."""
FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
POLL_SECONDS = 0.01
"""Seconds between two attempts at a lock that is waited for."""


class LockTaken(Exception):
    """Somebody else has the lock; the text says who: `process 7 on machine`."""


class Lock:
    """A lock that is held until `release`, or until this object or its process is gone.

    `is_effective` is False if the file system has no locks: then others may hold it, too.
    """

    def __init__(self, path: Path, fd: int, is_effective: bool) -> None:
        self.path, self.fd, self.process, self.is_effective = path, fd, os.getpid(), is_effective
        _locks.add(self)

    def release(self) -> None:
        """Releases the lock and removes its file; does nothing the second time."""
        if self.fd >= 0 and self.process == os.getpid():
            with contextlib.suppress(OSError):  # a directory that is gone, or read-only since
                self.path.unlink()
            self.forget()

    def forget(self) -> None:
        """Closes the file. In a forked process the lock stays its parent's."""
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


def acquire(path: Path, wait: float = 0.0) -> Lock:
    """Takes the lock of the file `path`, made if need be; tries for `wait` seconds.

    If the file system has no locks, it warns and locks nothing.

    Raises:
        LockTaken: somebody else holds it.
        OSError: the file cannot be made.
    """
    until = time.monotonic() + wait
    while True:
        fd, is_effective = os.open(path, FLAGS, 0o666), True
        try:
            _lock(fd)
        except OSError as error:
            if error.errno in ERRNO_LOCKED:
                content = os.pread(fd, 200, 0) if hasattr(os, "pread") else b""
                os.close(fd)
                if time.monotonic() < until:
                    time.sleep(POLL_SECONDS)
                    continue
                holder = content.decode(errors="replace")
                is_name = bool(holder) and holder.isprintable()
                raise LockTaken(holder if is_name else "another process") from None
            if error.errno not in NO_LOCKS:
                os.close(fd)
                raise
            is_effective = False
            _warn(path, error)
        if _is_there(path, fd):
            with contextlib.suppress(OSError):  # a full disk; the text is only for messages
                os.ftruncate(fd, 0)
                os.write(fd, f"process {os.getpid()} on {platform.node()}".encode())
            return Lock(path, fd, is_effective)
        os.close(fd)  # the holder released it and removed the file after this process opened it


@contextlib.contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Holds the lock of the file `path` for the time of the context; see `acquire`."""
    lock = acquire(path, wait)
    try:
        yield
    finally:
        lock.release()


def hold(fd: int) -> None:
    """Takes the lock of an open file for this process and all that inherit it open.

    The lock ends when the last of them has ended or closed it, so it tells whether a process lives
    whose output is the file.

    Raises:
        LockTaken: somebody else holds it.
        OSError: the file system has no locks.
    """
    try:
        _lock(fd)
    except OSError as error:
        if error.errno in ERRNO_LOCKED:
            raise LockTaken("another process") from None
        raise


def holder(path: Path) -> str | None:
    """Returns who holds the lock of the file `path`, as `process 7 on machine`; None if nobody.

    Nothing is made or written. Those who look at the same time do not see each other.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        _lock(fd, is_shared=True)
    except OSError as error:
        if error.errno in ERRNO_LOCKED:
            return os.read(fd, 200).decode(errors="replace")
    finally:
        os.close(fd)
    return None


def _is_there(path: Path, fd: int) -> bool:
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(status, os.fstat(fd))


def _warn(path: Path, error: OSError) -> None:
    warnings.warn(
        f"the file system of {path.parent} has no locks ({error.strerror}), so nothing keeps two "
        "processes from writing there at once; make sure that only one does",
        LorakinWarning,
        stacklevel=4,
    )
