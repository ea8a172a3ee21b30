"""One thread at a time changes a model's adapters, and none while another computes with them.

Which adapters are in use belongs to the model, not to a thread. Two things are refused: a change in
the middle of another thread's forward, and a forward of a thread whose choice of adapters another
thread has replaced. The end of a context, which restores what was in use before, is never refused;
instead the other thread's forward fails at its own end. `torch.compile` sees none of this.
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
from lorakin.inject.callers import first_argument

P = ParamSpec("P")
T = TypeVar("T")
ADVICE = "One model serves one thread at a time: hold a lock around activate and what you compute"


class ThreadTurns:
    """The state of one model: who changes it, who is in its forward, and who chose adapters last.

    Attributes:
        lock: held by the thread that changes adapters.
        depth: how many changes are under way in that thread; a change may consist of others.
        inside: the threads in a forward, by id.
        spoilt: ids of those under whose forward adapters changed.
        choices, latest: how many choices were made, and the number of the one in force.
        chooser: the thread that made it.
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
_of_thread = threading.local()


def _turns_of(model: nn.Module) -> ThreadTurns:
    """Returns the state of `model`, kept beside it, so that the model can be copied and pickled."""
    with _making:
        return _turns.setdefault(model, ThreadTurns())


@contextlib.contextmanager
def changing(model: nn.Module, refused: bool = True) -> Iterator[None]:
    """Holds the model's lock inside the context, to change its adapters.

    Args:
        model: the model to change.
        refused: whether a forward of another thread is an error.

    Raises:
        StateError: another thread is in a forward, and that is `refused`.

    >>> model = nn.Linear(2, 2)
    >>> with changing(model):
    ...     pass  # other threads that want to change adapters wait
    """
    turns = _turns_of(model)
    with turns.lock:
        others = _others(turns)
        if others and refused and not turns.depth:
            raise StateError(
                f"thread {others[0].name!r} is in a forward of this model, so its adapters cannot "
                f"change. {ADVICE}"
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


def fail_other_forwards(model: nn.Module) -> None:
    """Makes forwards of other threads under way end with an error; call it in `changing`."""
    turns = _turns_of(model)
    turns.spoilt |= {thread.ident for thread in _others(turns) if thread.ident is not None}


def one_at_a_time(change: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that changes the adapters of its first argument.

    It runs inside `changing`.
    """

    @functools.wraps(change)
    def changed(*args: P.args, **kwargs: P.kwargs) -> T:
        model_or_part: Any = first_argument(args, kwargs)
        is_model = isinstance(model_or_part, nn.Module)
        with changing(model_or_part if is_model else model_or_part.model):
            return change(*args, **kwargs)

    return changed


class Choice(NamedTuple):
    """What was in force before a choice: the latest one, who made it, and this thread's last."""

    latest: int
    chooser: threading.Thread | None
    of_this_thread: int | None


def record_choice(model: nn.Module) -> Choice:
    """Records that this thread chose the adapters in use; call it inside `changing`.

    Returns:
        what `undo_choice` takes to undo that.
    """
    turns = _turns_of(model)
    if not hasattr(_of_thread, "choices"):
        _of_thread.choices = weakref.WeakKeyDictionary()
    before = Choice(turns.latest, turns.chooser, _of_thread.choices.get(model))
    turns.choices += 1
    turns.latest, turns.chooser = turns.choices, threading.current_thread()
    _of_thread.choices[model] = turns.latest
    return before


def undo_choice(model: nn.Module, before: Choice) -> None:
    """Takes this thread's last choice back: `before` is in force again. Call it in `changing`."""
    turns, choices = _turns_of(model), getattr(_of_thread, "choices", {})
    if choices.get(model) == turns.latest:
        turns.latest, turns.chooser = before.latest, before.chooser
        if before.of_this_thread is None:
            del choices[model]
        else:
            choices[model] = before.of_this_thread


def begin_forward(model: nn.Module) -> None:
    """Records that a forward of the model begins.

    Raises:
        StateError: this thread chose the adapters to use, and another living one chose others
            since.
    """
    turns = _turns_of(model)
    with turns.lock:
        choice: int | None = getattr(_of_thread, "choices", {}).get(model)
        chooser = turns.chooser
        if choice not in (None, turns.latest) and chooser is not None and chooser.is_alive():
            raise StateError(
                f"thread {chooser.name!r} has chosen adapters since this one did. {ADVICE}"
            )
        turns.inside[threading.get_ident()] = threading.current_thread()
        turns.spoilt.discard(threading.get_ident())


def end_forward(model: nn.Module) -> None:
    """Records that a forward of the model has ended.

    Raises:
        StateError: another thread changed adapters meanwhile, so the output is a mixture.
    """
    turns, me = _turns_of(model), threading.get_ident()
    with turns.lock:
        turns.inside.pop(me, None)
        is_spoilt = me in turns.spoilt
        turns.spoilt.discard(me)
    if is_spoilt:
        raise StateError(
            "another thread left disabled(), scaled() or mixed_batch in the middle of this "
            f"forward. {ADVICE}"
        )
