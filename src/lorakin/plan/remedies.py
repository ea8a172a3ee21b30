"""Finds what makes a plan fit into memory, and how far batch and rank can grow."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from lorakin.errors import SettingError
from lorakin.family import Method
from lorakin.plan.conditions import Conditions
from lorakin.plan.prediction import Plan, plan_method

LARGEST_BATCH, LARGEST_RANK = 256, 256
DEARER = 0.03
"""The largest share of memory that a suggested higher rank may add."""

Option = tuple[str, dict[str, Any]]
"""Options of the command line, and the fields of `Conditions` that they change."""


def remedies(
    conditions: Conditions, method: Method, room: int, quantize: str | None = None
) -> list[tuple[str, Plan]]:
    """Returns options that make the method fit into `room` bytes, each with its plan.

    First single options and the largest batch; if none is enough, all options together, and then
    with a batch of one.
    """
    options: list[Option] = []
    if not conditions.fuse:
        options.append(("--fuse", {"fuse": True}))
    if not conditions.gradient_checkpointing:
        options.append(("--gradient-checkpointing", {"gradient_checkpointing": True}))
    if conditions.dtype == torch.float32:
        options.append(("--dtype bfloat16", {"dtype": torch.bfloat16}))
    fitting = list(_fitting(conditions, method, room, quantize, options))
    batch = largest_batch(conditions, method, room, conditions.batch_size // 2, quantize)
    if batch is not None:
        fitting.append(batch)
    if fitting:
        return fitting

    words = " ".join(word for word, _ in options)
    changes = {name: value for _, change in options for name, value in change.items()}
    one_row = {**changes, "batch_size": 1, "padded": False}
    together = [(words, changes), (f"{words} --batch-size 1".strip(), one_row)]
    return list(_fitting(conditions, method, room, quantize, together))[:1]


def _fitting(
    conditions: Conditions,
    method: Method,
    room: int,
    quantize: str | None,
    options: Iterable[Option],
) -> Iterator[tuple[str, Plan]]:
    """Yields the options that fit, with their plans."""
    for words, change in options:
        try:
            plan = plan_method(dataclasses.replace(conditions, **change), method, 1.0, quantize)
        except SettingError:  # such as --fuse for a model that it does not know
            continue
        if plan.peak <= room:
            yield words, plan


def largest_batch(
    conditions: Conditions, method: Method, room: int, limit: int, quantize: str | None = None
) -> tuple[str, Plan] | None:
    """Returns the largest batch, a power of two up to `limit`, that fits into `room` bytes.

    None: not even one row fits.
    """
    batches = [2**power for power in range(limit.bit_length())]
    found = _largest_of(batches, conditions, method, room, quantize)
    return None if found is None else (f"--batch-size {found[0]}", found[1])


def doubled_batch(
    conditions: Conditions, method: Method, plan: Plan, room: int, quantize: str | None
) -> tuple[int, Plan]:
    """Doubles the batch as often as it fits into `room` bytes; returns it and its plan."""
    rows = conditions.batch_size
    batches = [rows << times for times in range(1, (LARGEST_BATCH // rows).bit_length())]
    padded = dataclasses.replace(conditions, padded=True)
    return _largest_of(batches, padded, method, room, quantize) or (rows, plan)


def _largest_of(
    batches: Sequence[int], conditions: Conditions, method: Method, room: int, quantize: str | None
) -> tuple[int, Plan] | None:
    """Returns the largest of ascending batches that fits into `room` bytes, and its plan.

    It is found by halves, since each plan takes seconds. None: none fits.
    """

    @functools.cache
    def plan_of(rows: int) -> Plan:
        padded = conditions.padded and rows > 1
        changed = dataclasses.replace(conditions, batch_size=rows, padded=padded)
        return plan_method(changed, method, 1.0, quantize)

    fitting = bisect.bisect_right(batches, room, key=lambda rows: plan_of(rows).peak)
    return (batches[fitting - 1], plan_of(batches[fitting - 1])) if fitting else None


def highest_rank(
    conditions: Conditions, method: Method, plan: Plan, room: int, quantize: str | None
) -> tuple[int, Plan] | None:
    """Doubles the rank while it fits and costs at most `DEARER` more; returns it and its plan.

    None: the method has no single rank, or a doubled rank costs more.
    """
    if "rank" not in method.parametrisation.settings_of_modules():
        return None
    rank, best = method.setting("rank"), None
    while 2 * rank <= LARGEST_RANK:
        rank *= 2
        try:
            higher = plan_method(conditions, method.with_settings(rank=rank), 1.0, quantize)
        except SettingError:  # above the smaller side of a weight
            break
        if higher.peak > min(room, (1 + DEARER) * plan.peak):
            break
        best = rank, higher
    return best
