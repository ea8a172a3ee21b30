"""Running code from outside, such as a chat template, within a bound of time and memory."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator

from lorakin.errors import ModelError

try:
    import resource
except ImportError:  # Windows, where time alone is bounded
    resource = None  # type: ignore[assignment]

SECONDS, BYTES = 10.0, 2 << 30
PAGES = "/proc/self/statm"


class Unbounded(ModelError):
    """Code from outside that does not end, or fills the memory."""


class _Late(BaseException):
    """Raised in the thread that took too long.

    It is no Exception, so that no `except Exception` of that code catches it.
    """


@contextlib.contextmanager
def bounded(what: str, seconds: float = SECONDS, more_bytes: int = BYTES) -> Iterator[None]:
    """Ends what runs inside if it takes too long, or, on Linux, too much memory.

    Time is seen between Python's instructions. A single instruction that allocates too much is
    refused its memory.

    Args:
        what: what runs, for the message.
        seconds: the longest that it may take.
        more_bytes: how much more memory than now it may take.

    Raises:
        Unbounded: it took too much of either.
    """
    try:
        _watch.begin(seconds)
        try:
            with _less_memory(more_bytes):
                yield
        finally:
            _watch.end()
    except _Late:
        raise Unbounded(f"{what} did not end within {seconds:g} seconds") from None
    except MemoryError:
        raise Unbounded(f"{what} asks for more than {more_bytes / 2**30:g} GiB of memory") from None


class _Watch:
    """One thread that watches all that is bounded: one for each would cost more than they do."""

    LOOKS, IDLE = 0.05, 100
    """Seconds between looks, and looks without anything to see after which the thread ends."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends: dict[int, float] = {}  # of a thread, when what it runs must have ended
        self.runs = False

    def begin(self, seconds: float) -> None:
        with self.lock:
            self.ends[threading.get_ident()] = time.monotonic() + seconds
            if not self.runs:
                self.runs = True
                threading.Thread(target=self._look, daemon=True).start()

    def end(self) -> None:
        with self.lock:
            # The watcher has ended it: an exception that has not arrived yet is taken back.
            if self.ends.pop(threading.get_ident(), None) is None:
                _raise_in(threading.get_ident(), None)

    def _look(self) -> None:
        idle = 0
        while idle < self.IDLE:
            time.sleep(self.LOOKS)
            with self.lock:
                idle = 0 if self.ends else idle + 1
                for thread in [
                    thread for thread, end in self.ends.items() if time.monotonic() > end
                ]:
                    del self.ends[thread]
                    _raise_in(thread, _Late)
                self.runs = idle < self.IDLE


def _raise_in(thread: int, what: type[BaseException] | None) -> None:
    """Raises this in a thread before its next instruction; None takes back what is pending."""
    raised = ctypes.py_object(what) if what is not None else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


_watch = _Watch()


@contextlib.contextmanager
def _less_memory(more_bytes: int) -> Iterator[None]:
    """Limits the address space to what it is now and `more_bytes`."""
    if resource is None or (used := _address_space()) is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + more_bytes
    if resource.RLIM_INFINITY not in (soft, limit) and soft <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Returns the bytes of this process's address space; None if the system does not say."""
    try:
        with open(PAGES, encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return None
