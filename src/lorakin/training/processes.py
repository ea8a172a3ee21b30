"""The processes that train one model together, started by torchrun or accelerate; usually one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lorakin.errors import LorakinError

T = TypeVar("T")


def count() -> int:
    """Returns how many processes train, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in os.environ else 1


def shard() -> bool:
    """Returns whether the processes hold parts of the model, as their launcher says."""
    return any(os.environ.get(f"ACCELERATE_USE_{how}") == "true" for how in ("FSDP", "DEEPSPEED"))


def joined() -> Any:
    """Returns Accelerate's state of this process; the first call lets the processes connect."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def is_first() -> bool:
    """Returns whether this process writes files and talks to the user."""
    return count() == 1 or bool(joined().is_main_process)


def wait() -> None:
    """Waits until all processes are here."""
    if count() > 1:
        joined().wait_for_everyone()


def agreed(value: T) -> T:
    """Returns the first process's value, in all of them."""
    if count() == 1:
        return value
    joined()
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def everywhere(holds: bool) -> bool:
    """Returns whether something holds in every process."""
    if count() == 1:
        return holds
    flag = torch.tensor(int(holds), device=joined().device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)


def by_first(act: Callable[[], T]) -> T:
    """Returns what `act` returns in the first process, in all of them.

    Raises:
        LorakinError: what the first process raised, in all of them.
    """
    if count() == 1:
        return act()
    outcome: tuple[Any, LorakinError | None] = None, None
    if is_first():
        try:
            outcome = act(), None
        except LorakinError as error:
            outcome = None, error
    value: T
    value, wrong = agreed(outcome)
    if wrong is not None:
        raise wrong
    return value


def first_writes(write: Callable[[], object]) -> None:
    """Lets the first process write; the others wait until it has."""
    if is_first():
        write()
    wait()
