"""What `benchmarks.gpu` measures on a GPU, cell by cell, in the order of importance.

A worker process computes cells until the time is over, and writes each figure as soon as it has it.
What fails is written as failed, and the rest goes on.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers

import lorakin as lk
from benchmarks.gpu_bases import SHAPES, TOTAL_STEPS, make_base
from benchmarks.gpu_results import Results
from benchmarks.gpu_train import tokens_a_second
from benchmarks.measure import Spread, interleaved, ratio
from benchmarks.subjects import SUBJECTS, ours, theirs, twin

ROWS = 4
LONG_STEP = 1.0
"""Seconds. Longer steps are run for three rounds only."""
CORE = ("lora", "lora, dropout 0.05", "dora", "vera", "adalora")
REST = ("lora-fa", "lora+", "delta-lora")


class Cell(NamedTuple):
    """One line of a table: a subject over a base."""

    shape: str
    kind: str
    """Of the base: bfloat16, float16, nf4, or "compiled", which is bfloat16 with two layers."""
    subject: str
    """As in `SUBJECTS`, perhaps after "PEFT" or "PEFT narrow", perhaps before `lk.fuse`."""

    @property
    def section(self) -> str:
        """The table that the line is in."""
        return f"{self.shape}, {self.kind}"


def cells(shapes: list[str], memory: float) -> list[Cell]:
    """Returns what to measure on a GPU of so many GiB, the most important first."""
    core = ["frozen base, `lk.fuse`", "lora, `lk.fuse`"]
    rest = [f"PEFT, {name}" for name in CORE] + list(REST)
    for name in CORE:
        core += [name, f"PEFT narrow, {name}"]
    core = core[2:] + core[:2]

    def kind(shape: str) -> str:
        return "nf4" if shape == "8B" and memory < 40 else "bfloat16"

    first = sorted(shapes, key=["tiny", "135M", "8B", "1B"].index)
    chosen = [Cell(shape, kind(shape), subject) for shape in first[:2] for subject in core]
    chosen += [Cell("", "lorakin train", subject) for subject in ("lora", "lora, --fuse")]
    chosen += [Cell(shape, kind(shape), subject) for shape in first[2:] for subject in core]
    small = first[-1] if first[-1] != "8B" else first[0]
    loops = ("lora, GradScaler", "PEFT, lora, GradScaler")
    chosen += [Cell(small, "float16", subject) for subject in loops]
    for name in ("lora", "lora, dropout 0.05", "dora", "vera"):
        chosen += [Cell(small, "compiled", name), Cell(small, "compiled", f"PEFT, {name}")]
    chosen += [Cell(small, "nf4", name) for name in ("lora", "PEFT narrow, lora", "dora", "vera")]
    chosen += [Cell(shape, kind(shape), subject) for shape in first for subject in rest]
    return list(dict.fromkeys(chosen))


class Worker:
    """Measures the cells of a run one after another; holds one base at a time."""

    def __init__(self, results: Results, rounds: int, pretended: bool) -> None:
        self.results, self.rounds, self.pretended = results, rounds, pretended
        self.section = ""
        self.base: Any = None
        self.rows = 0

    def work(self) -> bool:
        """Measures all cells that wait; returns False if the process can go on no longer."""
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        while (entry := self.results.begin_next()) is not None:
            cell, began = Cell(*entry["cell"]), time.monotonic()
            try:
                figures = self.measured(cell)
            except torch.OutOfMemoryError:
                figures = {"failed": "out of memory"}
            except Exception as error:
                said = str(error).strip().partition("\n")[0][:120]
                figures = {"failed": f"{type(error).__name__}: {said}"}
            self.results.finish(entry, figures, time.monotonic() - began)
            try:
                free()
                torch.zeros(1, device="cuda").add_(1).item()
            except RuntimeError:
                return False  # after some errors a GPU answers no more in this process
        return True

    def measured(self, cell: Cell) -> dict[str, Any]:
        """Returns the figures of one cell."""
        if cell.kind == "lorakin train":
            self.base, self.section = None, ""
            free()
            return tokens_a_second(self.pretended, "--fuse" in cell.subject)
        if cell.section != self.section:
            self.base, self.section = None, ""
            free()
            self.base = make_base(cell.shape, cell.kind)
            self.rows = self.rows_that_fit(cell)
            self.section = cell.section
        length = SHAPES[cell.shape]["length"]
        step_of = Step(self.rows, length)
        compiled = cell.kind == "compiled"
        frozen = step_of(_maybe_compiled(twin(self.base), compiled))
        model, optimizer, allocate = self.subject(cell.subject)
        scaler = None
        if "GradScaler" in cell.subject:
            scaler = torch.amp.GradScaler("cuda")
        step = step_of(_maybe_compiled(model, compiled), optimizer, allocate, scaler)
        for one in (frozen, step):
            one()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        rounds = min(self.rounds, 3 if time.perf_counter() - began > LONG_STEP else self.rounds)
        wall = interleaved({"frozen": frozen, "subject": step}, rounds, "cuda")["wall"]
        return {
            "rows": self.rows,
            "length": length,
            "ratio": ratio(wall, "subject", "frozen"),
            "ms": [1e3 * figure for figure in Spread.of(wall["subject"])],
            "frozen ms": [1e3 * figure for figure in Spread.of(wall["frozen"])],
            "peak": peak_of(step),
        }

    def subject(self, name: str) -> tuple[Any, Any, Callable[[int], Any] | None]:
        """Returns a subject's model, its optimizer, and what PEFT calls after a step."""
        fuse = name.endswith("`lk.fuse`")
        name = name.removesuffix(", `lk.fuse`").removesuffix(", GradScaler")
        if name == "frozen base":
            model = twin(self.base)
            lk.fuse(model)
            return model, None, None
        if name.startswith("PEFT"):
            narrow = name.startswith("PEFT narrow")
            model = theirs(self.base, SUBJECTS[name.partition(", ")[2]], narrow)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
            return model, optimizer, getattr(model.base_model, "update_and_allocate", None)
        model, adapter = ours(self.base, SUBJECTS[name])
        if fuse:
            lk.fuse(model)
        return model, adapter.optimizer(lr=1e-5, total_steps=TOTAL_STEPS), None

    def rows_that_fit(self, cell: Cell) -> int:
        """Returns how many rows a step of plain LoRA takes, `ROWS` or fewer."""
        rows = ROWS
        while True:
            try:
                model, optimizer, _ = self.subject("lora")
                Step(rows, SHAPES[cell.shape]["length"])(model, optimizer)()
                return rows
            except torch.OutOfMemoryError:
                model = optimizer = None
                free()
                if rows == 1:
                    raise
                rows //= 2


class Step:
    """Makes functions that run forward, backward and the optimizer's step on one batch."""

    def __init__(self, rows: int, length: int) -> None:
        self.size = rows, length

    def __call__(
        self,
        model: Any,
        optimizer: Any = None,
        allocate: Callable[[int], Any] | None = None,
        scaler: Any = None,
    ) -> Callable[[], None]:
        """Returns the function; it takes embeddings, whose gradient it wants."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, self.size, generator=generator)
        ids, embeddings = ids.cuda(), model.get_input_embeddings()
        numbers: Iterator[int] = iter(range(1, TOTAL_STEPS))

        def run() -> None:
            inputs = embeddings(ids).detach().requires_grad_()
            loss = model(inputs_embeds=inputs, labels=ids).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
            if optimizer is None:
                return
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            if allocate is not None:
                allocate(next(numbers))
            optimizer.zero_grad()

        return run


def peak_of(step: Callable[[], None]) -> int:
    """Returns the bytes of tensors on the GPU at the peak of a step."""
    free()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def free() -> None:
    """Gives memory back that nothing uses."""
    gc.collect()
    torch.cuda.empty_cache()


def _maybe_compiled(model: Any, compiled: bool) -> Any:
    if compiled:
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward)
    return model
