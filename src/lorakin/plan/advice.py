"""The output of `lorakin plan`: each method's plan, what fits, and what would make it fit."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lorakin.errors import LorakinError, LorakinWarning, SettingError
from lorakin.family import Method, method_named
from lorakin.family.method_words import fair_settings, methods_of, settings_by_method
from lorakin.family.settings import require
from lorakin.inject.layer_numbers import parse_layers
from lorakin.inject.targets import ALL_LINEAR
from lorakin.plan.conditions import Conditions
from lorakin.plan.memory import available_of, imported_bytes, parse_memory, size
from lorakin.plan.prediction import LOADING, QUANTISED, Plan, frozen_step, plan_method
from lorakin.plan.rehearsal import EVALUATION
from lorakin.plan.remedies import DEARER, LARGEST_BATCH, doubled_batch, highest_rank, remedies
from lorakin.training import packing
from lorakin.training.glue import task_and_metric
from lorakin.training.limits import position_count_of_config, row_length
from lorakin.training.models import config_of
from lorakin.training.precision import DTYPES, best_device, resolve_dtype
from lorakin.training.tasks import planned_task
from lorakin.training.yaml_values import parse_settings

USUAL_LENGTH = 1024
"""The tokens of a row, if the user gives no length and the model has so many positions."""
SCALING = 2.0
"""The alpha / rank of a plain pair. Memory does not depend on it."""


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """A method with its plan, or the reason why it has none.

    Attributes:
        method: the method's words.
        plan: its plan; None if it cannot run.
        reason: why it cannot run.
        fits: whether it fits into memory; None if the memory is not known.
        remedies: options that make it fit, each with its plan.
    """

    method: str
    plan: Plan | None
    reason: str = ""
    fits: bool | None = None
    remedies: Sequence[tuple[str, Plan]] = ()

    def as_dict(self) -> dict[str, Any]:
        """Returns the row for `--json`."""
        if self.plan is None:
            return {"method": self.method, "reason": self.reason}
        ways = {words: plan.peak for words, plan in self.remedies}
        return {**self.plan.as_dict(), "fits": self.fits, "remedies": ways}


@dataclasses.dataclass(frozen=True)
class Advice:
    """Everything that `lorakin plan` says. Memory is in bytes.

    Attributes:
        model: the model as the user named it.
        conditions: everything but the method that decides the run.
        quantize: how the base is quantised, if it is.
        rows: one row for each method.
        memory: the available memory; None if that is not known.
        imported: the part of it that the process takes before the run begins.
        suggestions: "batch", "rank" and "targets" → a suggestion in words.
    """

    model: str
    conditions: Conditions
    quantize: str | None
    rows: list[PlanRow]
    memory: int | None
    imported: int
    suggestions: dict[str, str]

    @property
    def headline(self) -> str:
        """What was planned."""
        c = self.conditions
        weights = next(row.plan.weight_bytes for row in self.rows if row.plan is not None)
        classes = f" of {c.labels} classes" if c.labels is not None and c.labels > 1 else ""
        headline = (
            f"{self.model}, for the task {c.learned.word}{classes}, in {_name(c.dtype)} on "
            f"{c.device}: {size(weights)}; {c.batch_size} rows of {c.max_length} tokens"
        )
        if c.fuse:
            headline += ", fused"
        if c.gradient_checkpointing:
            headline += ", checkpointed"
        if c.packing:
            headline += ", packed"
        if self.quantize:
            headline += f", linear layers in {self.quantize} (computed, not rehearsed)"
        return headline

    @property
    def memory_line(self) -> str:
        """The available memory, in words."""
        if self.memory is None:
            return "unknown: there is no GPU here; give --memory"
        purpose = "for CUDA's context (assumed)"
        if self.conditions.device == "cpu":
            purpose = "for Python and its libraries"
        return f"{size(self.memory)}, {size(self.imported)} of it {purpose}"

    def lines(self) -> Iterator[str]:
        """Yields the lines below the table."""
        planned_rows = [(row, row.plan) for row in self.rows if row.plan is not None]
        yield (
            "step ×: the time of a step over that of forward and backward of the frozen base, "
            "from the arithmetic and memory traffic of each operation"
        )
        if any(plan.supposed for _, plan in planned_rows):
            yield (
                "* chooses its modules by a probe on data: planned as if all were equally "
                "important, which is the most it can take"
            )
        for row in self.rows:
            if row.plan is None:
                yield f"{row.method} cannot run with these settings: {row.reason}"
        for phase in (LOADING, EVALUATION):
            if methods := [row.method for row, plan in planned_rows if plan.phase == phase]:
                yield f"the peak of {', '.join(methods)} comes in {phase}, not in training"
        for row in self.rows:
            if row.fits is False:
                yield _remedy(row)
        yield from self.suggestions.values()

    def as_dict(self) -> dict[str, Any]:
        """Returns the advice for `--json`."""
        c = self.conditions
        return {
            "model": self.model,
            "dtype": _name(c.dtype),
            "device": c.device,
            "batch_size": c.batch_size,
            "max_length": c.max_length,
            "quantize": self.quantize,
            "memory": self.memory,
            "imported": self.imported,
            "methods": [row.as_dict() for row in self.rows],
            "suggestions": self.suggestions,
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _remedy(row: PlanRow) -> str:
    if not row.remedies:
        return f"{row.method} does not fit, not even with all options and one row at a time"
    ways = "; ".join(f"{words} ({size(plan.peak)})" for words, plan in row.remedies)
    return f"{row.method} does not fit; any one of these makes it fit: {ways}"


def advise(
    model: str,
    methods: Sequence[str] | None,
    rank: int | None,
    settings: Sequence[str] | None,
    *,
    labels: int | None,
    task: str | None,
    dtype: str,
    quantize: str | None,
    device: str | None,
    memory: str | None,
    **fields: Any,
) -> Advice:
    """Plans every method, checks what fits, and suggests batch and rank.

    Args:
        model: a packaged model, a `.gguf` file, a directory or a hub id.
        methods: methods with spaces between, or "all"; None is all.
        rank: the rank of plain LoRA; the other methods have a comparable size (see
            `Member.comparable_settings`). None: each method has its default.
        settings: more settings, for the methods that have them.
        labels: the number of a classifier's classes, 1 for regression; None for a language model.
        task: the word of the task; None is what `labels` tells.
        dtype: "float32", "bfloat16", "float16", "base" or "auto".
        quantize: a key of `QUANTISED`, or None.
        device: "cpu" or "cuda"; None is what `lorakin train` would take.
        memory: such as "24GB"; None is the free memory.
        fields: other fields of `Conditions`; `targets` and `layers` as on the command line.

    Raises:
        SettingError: no method has such a setting, a value is out of its range, or no method can
            run.
        ModelError: there is no such model.
    """
    total = None if memory is None else parse_memory(memory)
    require(
        quantize is None or quantize in QUANTISED,
        f"quantize must be one of {', '.join(QUANTISED)}, not {quantize!r}",
    )
    conditions = conditions_of(
        model, labels=labels, task=task, dtype=dtype, device=device, **fields
    )
    imported = imported_bytes(conditions.device)
    total = available_of(conditions.device, imported) if total is None else total
    room = None if total is None else total - imported

    settings_of = settings_by_method(
        methods_of(" ".join(methods or ["all"])), parse_settings(settings or [])
    )
    if rank is not None:
        settings_of = {
            words: {**fair_settings(words, rank, SCALING, conditions.steps), **given}
            for words, given in settings_of.items()
        }
    frozen = frozen_step(conditions)
    planned = [
        _row(conditions, words, given, frozen, quantize, room)
        for words, given in settings_of.items()
    ]
    rows = [row for row, _ in planned]
    if all(row.plan is None for row in rows):
        reasons = "; ".join(f"{row.method}: {row.reason}" for row in rows)
        raise SettingError(f"no method can run with these settings: {reasons}")

    suggested: dict[str, str] = {}
    fitting = ((row, method) for row, method in planned if row.fits and method is not None)
    first = next(fitting, None)
    if first is not None and room is not None:
        suggested = suggestions(conditions, *first, room, quantize)
    return Advice(model, conditions, quantize, rows, total, imported, suggested)


def conditions_of(
    model: str,
    *,
    labels: int | None,
    task: str | None,
    dtype: str,
    device: str | None,
    targets: Sequence[str],
    layers: str | None,
    max_length: int | None,
    **others: Any,
) -> Conditions:
    """Returns `Conditions` from the options of the command line.

    Raises:
        SettingError: a value is out of its range.
        ModelError: there is no such model.
    """
    for name in ("batch_size", "accumulate", "steps"):
        require(others[name] >= 1, f"{name} must be at least 1, not {others[name]}")
    require(labels is None or labels >= 1, f"labels must be at least 1, not {labels}")
    require(device in (None, "cpu", "cuda"), f"device must be cpu or cuda, not {device!r}")

    task, _ = task_and_metric(task, None, [])
    learned = planned_task(task, labels, config_of(model))
    config = config_of(model, learned.labels)
    if others.get("packing"):
        packing.check_task(learned)
    chosen = DTYPES.get(
        resolve_dtype(dtype, learned.labels is not None), config.dtype or torch.float32
    )
    return Conditions(
        config=config,
        dtype=chosen,
        device=device or best_device().type,
        labels=labels,
        task=task,
        max_length=_length(model, config, max_length),
        padded=others["batch_size"] > 1,
        targets=targets[0] if len(targets) == 1 else list(targets) or ALL_LINEAR,
        layers=None if layers is None else parse_layers(layers),
        **others,
    )


def _length(model: str, config: Any, max_length: int | None) -> int:
    """Returns the tokens of a row; warns if the user asked for more than the model was made for."""
    wanted = USUAL_LENGTH if max_length is None else max_length
    require(wanted >= 1, f"max_length must be at least 1, not {wanted}")
    positions = position_count_of_config(config)
    length = row_length(positions, wanted)
    made_for = positions or getattr(config, "max_position_embeddings", None) or length
    if max_length is not None and max_length > made_for:
        effect = "rows are cut there"
        if positions is None:
            effect = "it can read longer rows, but was not trained on them"
        warnings.warn(
            f"{model} has positions for {made_for} tokens, not {max_length}: {effect}",
            LorakinWarning,
            stacklevel=3,
        )
    return length


def _row(
    conditions: Conditions,
    words: str,
    given: dict[str, Any],
    frozen: float,
    quantize: str | None,
    room: int | None,
) -> tuple[PlanRow, Method | None]:
    """Plans one method and, if it does not fit into `room` bytes, looks for remedies."""
    try:
        method = method_named(words, given)
        plan = plan_method(conditions, method, frozen, quantize)
    except LorakinError as error:
        return PlanRow(words, None, str(error)), None
    if room is None:
        return PlanRow(words, plan), method
    fits = plan.peak <= room
    ways = () if fits else remedies(conditions, method, room, quantize)
    return PlanRow(words, plan, fits=fits, remedies=ways), method


def suggestions(
    conditions: Conditions, row: PlanRow, method: Method, room: int, quantize: str | None
) -> dict[str, str]:
    """Suggests the largest batch for a method that fits, and the highest cheap rank."""
    assert row.plan is not None
    rows, plan = doubled_batch(conditions, method, row.plan, room, quantize)
    suggested = {
        "batch": f"largest batch for {row.method}, doubled up to {LARGEST_BATCH}: "
        f"--batch-size {rows}, {size(plan.peak)}"
    }
    if (higher := highest_rank(conditions, method, row.plan, room, quantize)) is not None:
        rank, plan = higher
        suggested["rank"] = (
            f"rank for {row.method}: up to {rank} costs at most {DEARER:.0%} more memory "
            f"({size(plan.peak)} instead of {size(row.plan.peak)}); a higher rank gives more "
            f"capacity and a larger file ({size(plan.adapter_bytes)})"
        )
    if conditions.targets == ALL_LINEAR:
        suggested["targets"] = (
            f"targets: all-linear, {row.plan.modules} modules, fits, so there is no reason to "
            "adapt fewer"
        )
    return suggested
