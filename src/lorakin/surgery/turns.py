"""One thread at a time changes a model's adapters, and none while another computes with them.

Which adapters are in use is the model's, not a thread's. So a thread that has chosen some does not compute with others that
another thread chose since: that is refused, as is a change in the middle of another thread's forward. Under `torch.compile`
neither is seen.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from torch import nn

from lorakin.errors import StateError

P = ParamSpec("P")
T = TypeVar("T")
ADVICE = "One model serves one thread at a time: hold a lock around activate and what is computed with it"


class Turns:
    """Of one model: the lock of those who change it, the threads in its forward, and who chose adapters last.

    A change may be made of others; `depth` counts those that are under way.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.inside: dict[int, threading.Thread] = {}
        self.choices = 0
        self.chooser: threading.Thread | None = None


_turns: weakref.WeakKeyDictionary[nn.Module, Turns] = weakref.WeakKeyDictionary()
_making = threading.Lock()
_mine = threading.local()


def _turns_of(model: nn.Module) -> Turns:
    """Kept beside the model, which can then be copied and pickled."""
    with _making:
        return _turns.setdefault(model, Turns())


@contextlib.contextmanager
def changing(model: nn.Module, refused: bool = True) -> Iterator[None]:
    """Change the model's adapters inside the context, when other threads are through with changes of theirs.

    Raises:
        StateError: another thread is in the middle of a forward; unless that is not `refused`.
    """
    turns, me = _turns_of(model), threading.current_thread()
    with turns.lock:
        others = [thread for thread in list(turns.inside.values()) if thread is not me and thread.is_alive()]
        if others and refused and not turns.depth:
            raise StateError(
                f"thread {others[0].name!r} is in a forward of this model, so its adapters cannot change. {ADVICE}"
            )
        turns.depth += 1
        try:
            yield
        finally:
            turns.depth -= 1


def alone(change: Callable[P, T]) -> Callable[P, T]:
    """A function that changes the adapters of its first argument, a model, or what has one, by itself: see `changing`."""

    @functools.wraps(change)
    def changed(*args: P.args, **kwargs: P.kwargs) -> T:
        of: Any = args[0] if args else next(iter(kwargs.values()))
        with changing(of if isinstance(of, nn.Module) else of.model):
            return change(*args, **kwargs)

    return changed


def chosen(model: nn.Module) -> None:
    """Note that this thread has chosen the adapters in use; inside `changing`."""
    turns = _turns_of(model)
    turns.choices, turns.chooser = turns.choices + 1, threading.current_thread()
    if not hasattr(_mine, "choices"):
        _mine.choices = weakref.WeakKeyDictionary()
    _mine.choices[model] = turns.choices


def enter(model: nn.Module) -> None:
    """A forward of the model begins.

    Raises:
        StateError: this thread chose the adapters to use, and another, which is still there, has chosen others since.
    """
    turns = _turns_of(model)
    with turns.lock:
        mine: int | None = getattr(_mine, "choices", {}).get(model)
        other = turns.chooser
        if mine not in (None, turns.choices) and other is not None and other.is_alive():
            raise StateError(f"thread {other.name!r} has chosen adapters since this one did. {ADVICE}")
        turns.inside[threading.get_ident()] = threading.current_thread()


def leave(model: nn.Module) -> None:
    """It has ended."""
    _turns_of(model).inside.pop(threading.get_ident(), None)
