"""What a training run would take, said before anything is downloaded or trained.

The model is made of its config alone, without numbers, and the run rehearsed on it (`rehearsal.py`): so bytes of tensors are
counted, not estimated. What a process takes beside its tensors is not: `BESIDE`, `HOLES` and a machine's speed are measured
figures. docs/howto/memory.md sets predictions beside measured peaks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import psutil
import torch

from lorakin.errors import LorakinError, SettingError
from lorakin.family import Method
from lorakin.inject.layers import is_linear
from lorakin.inject.targets import head_of
from lorakin.plan.rehearsal import FORWARD, PHASES, Conditions, Rehearsed, frozen_seconds, rehearse
from lorakin.plan.skeleton import built
from lorakin.plan.traced import Machine

GIB, MIB = 2**30, 2**20
LOADING = "loading"
BESIDE = 85 * MIB
"""What `lorakin train` holds on a CPU beside tensors and what it imports: tokenizer, rows, the Trainer, code that is run."""
HOLES = 0.3
"""Bytes that malloc keeps for a byte of the tensors below 32 MiB that are alive at a peak: holes that nothing fits into."""
CONTEXT = GIB // 2
"""What CUDA takes of a card before the first tensor. Assumed, not measured."""
CARD = Machine(flops=2e14, bandwidth=1.5e12, dispatch=5e-6)
"""What is assumed of a card: about an A100."""
DISPATCH = 8e-6
"""Seconds that an operation takes before it begins, Python's share in autograd functions included."""
QUANTISED = {"nf4": 4.127 / 8, "int8": 1.0, "torchao-int8": 1.0}
"""Bytes that are kept of a weight; eight bits have a float32 for each output, too."""
UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one method would take. Memory is in bytes; on a CPU it is what the process adds to what it has imported."""

    method: str
    trainable_parameters: int
    adapter_bytes: int
    """All of the adapter's tensors, frozen ones included, each once."""
    rank: int | None
    """Of the pairs as training begins; methods have defaults of their own. None of a pair that has no one rank."""
    modules: int
    """How many are adapted."""
    weight_bytes: int
    """The base model."""
    optimizer_bytes: int
    """The optimizer's state, and what members remember between steps."""
    activation_bytes: int
    """Activations and temporary tensors at the peak of forward and backward."""
    peaks: dict[str, int]
    """Phase → its peak."""
    step: float
    """A step's time over that of forward and backward of the frozen base."""
    supposed: bool
    """The method chooses its modules by a probe; this is its worst case."""

    @property
    def peak(self) -> int:
        """The highest of all phases."""
        return max(self.peaks.values())

    @property
    def phase(self) -> str:
        """In which it comes."""
        return max(self.peaks, key=lambda phase: self.peaks[phase])

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**dataclasses.asdict(self), "peak": self.peak, "phase": self.phase}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A method that cannot run like that, and why."""

    method: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return dataclasses.asdict(self)


def plan(
    conditions: Conditions, methods: Iterable[Method], quantize: str | None = None
) -> list[Plan | Refusal]:
    """What each of `methods` would take under `conditions`; those that cannot run are refused with their reason.

    Args:
        conditions: the model's config, dtype, batch and so on.
        methods: see `lorakin.family.method_named`.
        quantize: "nf4" or "int8": the linear layers but the head as bitsandbytes would keep them, by arithmetic alone.

    Raises:
        SettingError: an unknown quantisation.
        LorakinError: the base model itself cannot be planned.
    """
    frozen = frozen_step(conditions)
    found: list[Plan | Refusal] = []
    for method in methods:
        try:
            found.append(planned(conditions, method, frozen, quantize))
        except LorakinError as error:
            found.append(Refusal(method.words, str(error)))
    return found


def planned(
    conditions: Conditions, method: Method, frozen: float, quantize: str | None = None
) -> Plan:
    """The plan of one method; `frozen` is `frozen_step(conditions)`.

    Raises:
        LorakinError: it cannot run like that.
    """
    rehearsed = rehearse(conditions, method, machine(conditions.device, conditions.dtype))
    at = rehearsed.peaks[FORWARD].kinds
    saved, transient = quantised(conditions, quantize) if quantize else (0, 0)
    return Plan(
        method=method.words,
        trainable_parameters=rehearsed.trainable_parameters,
        adapter_bytes=rehearsed.adapter_bytes,
        rank=getattr(method.parametrisation, "rank", None),
        modules=rehearsed.modules,
        weight_bytes=at["weights"] - saved,
        optimizer_bytes=at.get("optimizer", 0),
        activation_bytes=at.get("activations", 0) + transient,
        peaks={
            phase: peak - saved + transient
            for phase, peak in process_peaks(conditions, rehearsed).items()
        },
        step=rehearsed.seconds / frozen,
        supposed=method.probe is not None,
    )


def frozen_step(conditions: Conditions) -> float:
    """Seconds of forward and backward of the frozen base; only quotients of such seconds mean anything."""
    return frozen_seconds(conditions, machine(conditions.device, conditions.dtype))


def process_peaks(conditions: Conditions, rehearsed: Rehearsed) -> dict[str, int]:
    """What a process holds at the peak of each phase.

    On a card, its tensors. On a CPU malloc maps tensors of 32 MiB and more alone and gives them back; what is smaller stays
    with the process from the phase that needed most of it, with holes. Weights in another dtype than their files' are
    converted from these, which are mapped until that is done.
    """
    tensors = {phase: rehearsed.peaks[phase] for phase in PHASES}
    if conditions.device != "cpu":
        return {phase: peak.total for phase, peak in tensors.items()}
    kept, held = 0, {}
    for phase, peak in tensors.items():
        kept = max(kept, round((1 + HOLES) * peak.pieces))
        held[phase] = peak.total - peak.pieces + kept + BESIDE
    weights = tensors[FORWARD].kinds["weights"]
    stored = conditions.config.dtype or torch.float32
    files = (
        0 if stored == conditions.dtype else weights * stored.itemsize // conditions.dtype.itemsize
    )
    return {LOADING: weights + files, **held}


def quantised(conditions: Conditions, quantize: str) -> tuple[int, int]:
    """Bytes that quantising saves, and those of the largest weight made whole again, which is needed for a moment.

    Raises:
        SettingError: another quantisation than those of `QUANTISED`.
    """
    if quantize not in QUANTISED:
        raise SettingError(f"quantize must be one of {', '.join(QUANTISED)}, not {quantize!r}")
    model = built(conditions.config, conditions.dtype, conditions.labels is not None)
    heads = tuple(head_of(model))
    saved = largest = 0.0
    for path, module in model.named_modules():
        if is_linear(module) and not path.startswith(heads or (" ",)):
            weight = module.weight
            scales = 4 * len(weight) if QUANTISED[quantize] == 1 else 0
            saved += weight.numel() * (weight.element_size() - QUANTISED[quantize]) - scales
            largest = max(largest, weight.numel() * weight.element_size())
    return round(saved), round(largest)


@functools.cache
def machine(device: str, dtype: torch.dtype) -> Machine:
    """How fast `device` is: a CPU measured in a tenth of a second, a card assumed."""
    if device != "cpu":
        return CARD
    x, weight, thin = (
        torch.ones(shape, dtype=dtype) for shape in ((1024, 576), (576, 1536), (576, 16))
    )
    product = _least_seconds(lambda: x @ weight)
    passes = (
        lambda: x * x,
        lambda: torch.nn.functional.silu(x),
        lambda: x @ thin,
    )  # three, two and one time x
    moved = 6 * x.numel() * dtype.itemsize / sum(_least_seconds(one) for one in passes)
    return Machine(2 * x.numel() * weight.shape[1] / product, moved, DISPATCH)


def _least_seconds(call: Callable[[], Any]) -> float:
    least = math.inf
    for _ in range(20):
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least


def parse_memory(text: str) -> int:
    """ "24GB" (10⁹), "24GiB" (2³⁰), "24000MB" → bytes.

    Raises:
        SettingError: another form.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    unit = match[2].lower() if match else None
    if match is None or unit not in UNITS or not unit or float(match[1]) <= 0:
        raise SettingError(
            f"memory must be a size with its unit, such as 24GB, 24GiB or 24000MB, not {text!r}"
        )
    return int(float(match[1]) * UNITS[unit])


def available_memory(device: str) -> int | None:
    """Bytes free on the card, or on this machine; None of a card that is not there."""
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def imported_bytes(device: str) -> int:
    """What a process takes before the plan's figures begin: what this one has imported; on a card, CUDA's context."""
    return int(psutil.Process().memory_info().rss) if device == "cpu" else CONTEXT


def remedies(
    conditions: Conditions, method: Method, room: int, quantize: str | None = None
) -> list[tuple[str, Plan]]:
    """What makes a plan fit into `room` bytes, each planned: (option, plan).

    Options alone, and the largest batch; if none of them is enough, options together, then with a batch of one.
    """
    options: list[tuple[str, dict[str, Any]]] = []
    if not conditions.fuse:
        options.append(("--fuse", {"fuse": True}))
    if not conditions.gradient_checkpointing:
        options.append(("--gradient-checkpointing", {"gradient_checkpointing": True}))
    if conditions.dtype == torch.float32:
        options.append(("--dtype bfloat16", {"dtype": torch.bfloat16}))
    found = list(_fitting(conditions, method, room, quantize, options))
    if (
        batch := largest_batch(conditions, method, room, conditions.batch_size // 2, quantize)
    ) is not None:
        found.append(batch)
    if found:
        return found
    together = (
        " ".join(word for word, _ in options),
        {k: v for _, change in options for k, v in change.items()},
    )
    least = (
        f"{together[0]} --batch-size 1".strip(),
        {**together[1], "batch_size": 1, "padded": False},
    )
    return list(_fitting(conditions, method, room, quantize, [together, least]))[:1]


def _fitting(
    conditions: Conditions,
    method: Method,
    room: int,
    quantize: str | None,
    options: Iterable[tuple[str, dict[str, Any]]],
) -> Iterator[tuple[str, Plan]]:
    for words, change in options:
        try:
            there = planned(dataclasses.replace(conditions, **change), method, 1.0, quantize)
        except SettingError:  # such as fuse on a model of which it knows nothing: no remedy then
            continue
        if there.peak <= room:
            yield words, there


def largest_batch(
    conditions: Conditions, method: Method, room: int, limit: int, quantize: str | None = None
) -> tuple[str, Plan] | None:
    """The largest batch of a power of two up to `limit` that fits into `room` bytes, planned; None if not even one row does."""
    at: dict[int, Plan] = {}

    def of(rows: int) -> Plan:
        changed = dataclasses.replace(
            conditions, batch_size=rows, padded=conditions.padded and rows > 1
        )
        at.setdefault(rows, planned(changed, method, 1.0, quantize))
        return at[rows]

    if limit < 1 or of(1).peak > room:
        return None
    low, high = 0, int(math.log2(limit))  # 2**low fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if of(2**middle).peak <= room else (low, middle - 1)
    return f"--batch-size {2**low}", of(2**low)
