"""What to do about a plan: what fits, what would make the rest fit, and which batch and rank the memory allows."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lorakin.errors import LorakinError, LorakinWarning, SettingError
from lorakin.family import Method, method_named
from lorakin.family.settings import require
from lorakin.family.words import fair_settings, given_to, methods_of
from lorakin.inject.layer_numbers import parse_layers
from lorakin.inject.targets import ALL_LINEAR
from lorakin.plan.prediction import (
    LOADING,
    QUANTISED,
    Plan,
    available_memory,
    frozen_step,
    imported_bytes,
    parse_memory,
    planned,
    remedies,
)
from lorakin.plan.rehearsal import EVALUATION, Conditions
from lorakin.training.limits import places_of, row_length
from lorakin.training.models import config_of
from lorakin.training.precision import DTYPES, best_device, resolve_dtype
from lorakin.training.recipe import parse_settings

USUAL_LENGTH, LARGEST_BATCH, LARGEST_RANK = 1024, 256, 256
DEARER = 0.03
"""By how much memory may grow for a higher rank to be suggested."""


SCALING = 2.0
"""alpha / rank of a plain pair, which memory does not depend on."""


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """A method, its plan or why there is none, and what would make it fit if it does not."""

    method: str
    plan: Plan | None
    reason: str = ""
    fits: bool | None = None
    remedies: Sequence[tuple[str, Plan]] = ()

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        if self.plan is None:
            return {"method": self.method, "reason": self.reason}
        return {
            **self.plan.as_dict(),
            "fits": self.fits,
            "remedies": {words: plan.peak for words, plan in self.remedies},
        }


@dataclasses.dataclass(frozen=True)
class Advice:
    """All that `lorakin plan` says. Memory is in bytes."""

    model: str
    conditions: Conditions
    quantize: str | None
    rows: list[PlanRow]
    memory: int | None
    """What there is, None if nobody knows."""
    imported: int
    """What of it the process takes before the run begins."""
    suggestions: dict[str, str]
    """batch, rank → the suggestion in words."""

    @property
    def headline(self) -> str:
        """What was planned."""
        c = self.conditions
        weights = next(row.plan.weight_bytes for row in self.rows if row.plan is not None)
        kind = (
            f"a classifier of {c.labels} classes"
            if c.labels is not None
            else "causal language model"
        )
        options = [
            word
            for word, on in (("fused", c.fuse), ("checkpointed", c.gradient_checkpointing))
            if on
        ]
        options += (
            [f"linear layers in {self.quantize}, by arithmetic alone"] if self.quantize else []
        )
        return (
            f"{self.model}, {kind} in {str(c.dtype).removeprefix('torch.')} on {c.device}: {size(weights)}; "
            f"{c.batch_size} rows of {c.max_length} tokens{''.join(f', {word}' for word in options)}"
        )

    @property
    def memory_line(self) -> str:
        """What there is."""
        if self.memory is None:
            return "unknown: there is no card here, so give --memory"
        what = (
            "Python and its libraries"
            if self.conditions.device == "cpu"
            else "assumed for CUDA's context"
        )
        return f"{size(self.memory)}, of it {size(self.imported)} {what}"

    def lines(self) -> Iterator[str]:
        """What is to be said below the table."""
        yield "step ×: time of a step over forward and backward of the frozen base, by arithmetic and traffic of each operation"
        if any(row.plan is not None and row.plan.supposed for row in self.rows):
            yield "* chooses its modules by a probe on data: planned as if all mattered alike, which is the most it can take"
        for row in self.rows:
            if row.plan is None:
                yield f"{row.method}: cannot run like that: {row.reason}"
        for phase in (LOADING, EVALUATION):
            if there := [
                row.method for row in self.rows if row.plan is not None and row.plan.phase == phase
            ]:
                yield f"the peak of {', '.join(there)} is not in training but in {phase}"
        for row in self.rows:
            if row.fits is False:
                ways = "; ".join(f"{words} ({size(plan.peak)})" for words, plan in row.remedies)
                nothing = "nothing that was tried, not even all options and one row a batch"
                yield f"{row.method} does not fit; it does with any one of: {ways or nothing}"
        yield from self.suggestions.values()

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        c = self.conditions
        return {
            "model": self.model,
            "dtype": str(c.dtype).removeprefix("torch."),
            "device": c.device,
            "batch_size": c.batch_size,
            "max_length": c.max_length,
            "quantize": self.quantize,
            "memory": self.memory,
            "imported": self.imported,
            "methods": [row.as_dict() for row in self.rows],
            "suggestions": self.suggestions,
        }


def advise(
    model: str, method: Sequence[str] | None, rank: int | None, settings: Sequence[str] | None, *,
    labels: int | None, dtype: str, quantize: str | None, device: str | None, memory: str | None, **where: Any,
) -> Advice:  # fmt: skip
    """Plan every method asked for, see what fits, and suggest.

    Args:
        model: a packaged model, a `.gguf` file, a directory or a hub id.
        method: texts of methods with spaces between, or "all"; None is all.
        rank: of a plain pair; the others are taken at their fair size beside it (see `Member.fair`). None: each one's own.
        settings: for whichever methods have them.
        labels, dtype, device: see `Conditions`; None is what `lorakin train` would take.
        memory: such as "24GB"; None is what is free.
        where: other fields of `Conditions`; `targets`, `layers` as on the command line.

    Raises:
        SettingError: a setting that none of the methods has or that is out of its range; or no method can run like that.
        ModelError: no such model.
    """
    room = None if memory is None else parse_memory(memory)
    require(
        quantize is None or quantize in QUANTISED,
        f"quantize must be one of {', '.join(QUANTISED)}, not {quantize!r}",
    )
    conditions = conditions_of(model, labels=labels, dtype=dtype, device=device, **where)
    imported = imported_bytes(conditions.device)
    room = available_of(conditions.device, imported) if room is None else room
    left = None if room is None else room - imported
    sized = given_to(methods_of(" ".join(method or ["all"])), parse_settings(settings or []))
    if rank is not None:
        sized = {
            words: {**fair_settings(words, rank, SCALING, conditions.steps), **own}
            for words, own in sized.items()
        }
    frozen = frozen_step(conditions)
    found = {
        words: _row(conditions, words, given, frozen, quantize, left)
        for words, given in sized.items()
    }
    rows = [row for row, _ in found.values()]
    if all(row.plan is None for row in rows):
        raise SettingError(
            "no method can run like that: "
            + "; ".join(f"{row.method}: {row.reason}" for row in rows)
        )
    best = next(
        ((row, made) for row, made in found.values() if row.fits and made is not None), None
    )
    suggested = (
        {}
        if best is None or left is None
        else suggestions(conditions, best[0], best[1], left, quantize)
    )
    return Advice(model, conditions, quantize, rows, room, imported, suggested)


def conditions_of(
    model: str, *, labels: int | None, dtype: str, device: str | None, targets: Sequence[str], layers: str | None,
    max_length: int | None, **others: Any,
) -> Conditions:  # fmt: skip
    """`Conditions` from the command line's words; `max_length` None is `USUAL_LENGTH`, or what the model has positions for."""
    for name in ("batch_size", "accumulate", "steps"):
        require(others[name] >= 1, f"{name} must be at least 1, not {others[name]}")
    require(labels is None or labels >= 2, f"labels must be at least 2, not {labels}")
    require(device in (None, "cpu", "cuda"), f"device must be cpu or cuda, not {device!r}")
    classes = None if labels is None else [str(number) for number in range(labels)]
    config = config_of(model, classes)
    wanted = USUAL_LENGTH if max_length is None else max_length
    require(wanted >= 1, f"max_length must be at least 1, not {wanted}")
    there = places_of(config)
    length = row_length(there, wanted)
    made_for = there or getattr(config, "max_position_embeddings", None) or length
    if max_length is not None and max_length > made_for:
        but = (
            "rows are cut there" if there is not None else "it can read on, but was not trained to"
        )
        warnings.warn(
            f"{model} has positions for {made_for} tokens, not {wanted}: {but}",
            LorakinWarning,
            stacklevel=2,
        )
    chosen = DTYPES.get(resolve_dtype(dtype, labels is not None), config.dtype or torch.float32)
    return Conditions(
        config=config,
        dtype=chosen,
        device=device or best_device().type,
        labels=labels,
        max_length=length,
        padded=others["batch_size"] > 1,
        targets=targets[0] if len(targets) == 1 else list(targets) or ALL_LINEAR,
        layers=None if layers is None else parse_layers(layers),
        **others,
    )


def available_of(device: str, imported: int) -> int | None:
    """What a run could have: on a CPU, what is free and what this process, which would be its, has imported."""
    free = available_memory(device)
    return None if free is None else free + (imported if device == "cpu" else 0)


def _row(
    conditions: Conditions,
    words: str,
    given: dict[str, Any],
    frozen: float,
    quantize: str | None,
    left: int | None,
) -> tuple[PlanRow, Method | None]:
    try:
        method = method_named(words, given)
        plan = planned(conditions, method, frozen, quantize)
    except LorakinError as error:
        return PlanRow(words, None, str(error)), None
    fits = None if left is None else plan.peak <= left
    ways = (
        remedies(conditions, method, left, quantize) if fits is False and left is not None else ()
    )
    return PlanRow(words, plan, "", fits, ways), method


def suggestions(
    conditions: Conditions, row: PlanRow, method: Method, left: int, quantize: str | None
) -> dict[str, str]:
    """The largest batch for a method that fits, and the highest rank that costs hardly more."""
    assert row.plan is not None
    said = {}
    rows, plan = doubled_batch(conditions, method, row.plan, left, quantize)
    said["batch"] = (
        f"largest batch for {row.method}, doubled up to {LARGEST_BATCH}: --batch-size {rows}, {size(plan.peak)}"
    )
    if (higher := highest_rank(conditions, method, row.plan, left, quantize)) is not None:
        rank, plan = higher
        said["rank"] = (
            f"rank for {row.method}: up to {rank} costs at most {DEARER:.0%} more memory ({size(plan.peak)} instead of "
            f"{size(row.plan.peak)}); more rank is more capacity and a larger file ({size(plan.adapter_bytes)})"
        )
    if conditions.targets == ALL_LINEAR:
        said["targets"] = (
            f"targets: all-linear, {row.plan.modules} modules, fits, so there is no reason to adapt fewer"
        )
    return said


def doubled_batch(
    conditions: Conditions, method: Method, plan: Plan, left: int, quantize: str | None
) -> tuple[int, Plan]:
    """The batch, doubled as often as it fits, and its plan."""
    rows = conditions.batch_size
    while 2 * rows <= LARGEST_BATCH:
        larger = planned(
            dataclasses.replace(conditions, batch_size=2 * rows, padded=True), method, 1.0, quantize
        )
        if larger.peak > left:
            break
        rows, plan = 2 * rows, larger
    return rows, plan


def highest_rank(
    conditions: Conditions, method: Method, plan: Plan, left: int, quantize: str | None
) -> tuple[int, Plan] | None:
    """The largest rank of a power of two that fits and costs at most `DEARER` more memory; None if a method has no one rank."""
    if "rank" not in method.parametrisation.per_module:
        return None
    rank, best = method.setting("rank"), None
    while 2 * rank <= LARGEST_RANK:
        rank *= 2
        try:
            higher = planned(conditions, method.at(rank=rank), 1.0, quantize)
        except SettingError:  # above the smaller side of a weight
            break
        if higher.peak > min(left, (1 + DEARER) * plan.peak):
            break
        best = rank, higher
    return best


def size(count: int) -> str:
    """Bytes in words: "1.5 GB" is 1.5·10⁹."""
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if amount >= 99.5 or unit == "B" else f"{amount:.3g} {unit}"
