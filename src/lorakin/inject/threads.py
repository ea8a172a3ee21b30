"""One thread at a time changes a model's adapters, and none while another computes with them.

Which adapters are in use is the model's, not a thread's. So a thread that has chosen some does not compute with others that
another thread chose since: that is refused, as is a change in the middle of another thread's forward. What a context puts
back at its end is never refused: the forward that was under way is, at its own end. Under `torch.compile` none of it is seen.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import nn

from lorakin.errors import StateError

P = ParamSpec("P")
T = TypeVar("T")
ADVICE = "One model serves one thread at a time: hold a lock around activate and what is computed with it"


class ThreadTurns:
    """Of one model: the lock of those who change it, the threads in its forward, and who chose adapters last.

    A change may be made of others; `depth` counts those that are under way. `spoilt` are those of the threads inside under
    whose forward adapters changed. Each choice has a number; `choices` counts them, and `latest` is in force.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth = 0
        self.inside: dict[int, threading.Thread] = {}
        self.spoilt: set[int] = set()
        self.choices = self.latest = 0
        self.chooser: threading.Thread | None = None


_turns: weakref.WeakKeyDictionary[nn.Module, ThreadTurns] = weakref.WeakKeyDictionary()
_making = threading.Lock()
_mine = threading.local()


def _turns_of(model: nn.Module) -> ThreadTurns:
    """Kept beside the model, which can then be copied and pickled."""
    with _making:
        return _turns.setdefault(model, ThreadTurns())


@contextlib.contextmanager
def changing(model: nn.Module, refused: bool = True) -> Iterator[None]:
    """Change the model's adapters inside the context, when other threads are through with changes of theirs.

    Raises:
        StateError: another thread is in the middle of a forward; unless that is not `refused`.
    """
    turns = _turns_of(model)
    with turns.lock:
        others = _others(turns)
        if others and refused and not turns.depth:
            raise StateError(
                f"thread {others[0].name!r} is in a forward of this model, so its adapters cannot change. {ADVICE}"
            )
        turns.depth += 1
        try:
            yield
        finally:
            turns.depth -= 1


def _others(turns: ThreadTurns) -> list[threading.Thread]:
    me = threading.current_thread()
    return [
        thread for thread in list(turns.inside.values()) if thread is not me and thread.is_alive()
    ]


def spoil(model: nn.Module) -> None:
    """Let forwards of other threads that are under way end with an error; inside `changing`, where that is not refused."""
    turns = _turns_of(model)
    turns.spoilt |= {thread.ident for thread in _others(turns) if thread.ident is not None}


def alone(change: Callable[P, T]) -> Callable[P, T]:
    """A function that changes the adapters of its first argument, a model, or what has one, by itself: see `changing`."""

    @functools.wraps(change)
    def changed(*args: P.args, **kwargs: P.kwargs) -> T:
        of: Any = args[0] if args else next(iter(kwargs.values()))
        with changing(of if isinstance(of, nn.Module) else of.model):
            return change(*args, **kwargs)

    return changed


class Choice(NamedTuple):
    """Before a thread chose: the latest choice, who made it, and the thread's own."""

    latest: int
    chooser: threading.Thread | None
    mine: int | None


def chosen(model: nn.Module) -> Choice:
    """Note that this thread has chosen the adapters in use; inside `changing`. Returns what `chosen_before` takes."""
    turns = _turns_of(model)
    if not hasattr(_mine, "choices"):
        _mine.choices = weakref.WeakKeyDictionary()
    before = Choice(turns.latest, turns.chooser, _mine.choices.get(model))
    turns.choices += 1
    turns.latest, turns.chooser = turns.choices, threading.current_thread()
    _mine.choices[model] = turns.latest
    return before


def chosen_before(model: nn.Module, before: Choice) -> None:
    """Note that this thread's last choice is taken back, so that the one `before` it is in force again; inside `changing`."""
    turns, mine = _turns_of(model), getattr(_mine, "choices", {})
    if mine.get(model) == turns.latest:
        turns.latest, turns.chooser = before.latest, before.chooser
        if before.mine is None:
            del mine[model]
        else:
            mine[model] = before.mine


def enter(model: nn.Module) -> None:
    """A forward of the model begins.

    Raises:
        StateError: this thread chose the adapters to use, and another, which is still there, has chosen others since.
    """
    turns = _turns_of(model)
    with turns.lock:
        mine: int | None = getattr(_mine, "choices", {}).get(model)
        other = turns.chooser
        if mine not in (None, turns.latest) and other is not None and other.is_alive():
            raise StateError(
                f"thread {other.name!r} has chosen adapters since this one did. {ADVICE}"
            )
        turns.inside[threading.get_ident()] = threading.current_thread()
        turns.spoilt.discard(threading.get_ident())


def leave(model: nn.Module) -> None:
    """It has ended.

    Raises:
        StateError: another thread changed adapters meanwhile, so its output is a mixture.
    """
    turns, me = _turns_of(model), threading.get_ident()
    with turns.lock:
        turns.inside.pop(me, None)
        is_spoilt = me in turns.spoilt
        turns.spoilt.discard(me)
    if is_spoilt:
        raise StateError(
            f"another thread left disabled(), scaled() or mixed_batch in the middle of this forward. {ADVICE}"
        )
