"""The peaks that `lorakin plan` predicts for the runs that `benchmarks.gpu` measures.

A plan takes seconds of the CPU and no GPU, so a process of its own makes them meanwhile.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

from benchmarks.gpu_bases import SHAPES, TOTAL_STEPS, config_of
from benchmarks.gpu_results import Results
from benchmarks.subjects import SUBJECTS
from lorakin.family import Method
from lorakin.plan.conditions import Conditions
from lorakin.plan.prediction import plan_method


def peak_of(shape: str, kind: str, subject: str, rows: int) -> int:
    """Returns the bytes of tensors on the GPU at the peak of a run, as `lorakin plan` computes."""
    conditions = Conditions(
        config_of(shape, kind),
        torch.float16 if kind == "float16" else torch.bfloat16,
        "cuda",
        batch_size=rows,
        max_length=SHAPES[shape]["length"],
        padded=False,
        fuse="`lk.fuse`" in subject,
        steps=TOTAL_STEPS,
    )
    method = Method.of(SUBJECTS[_name(subject)].ours())
    # Only its time is set against the frozen base's, 1 here.
    return plan_method(conditions, method, 1.0, "nf4" if kind == "nf4" else None).peak


def _name(subject: str) -> str:
    return subject.removesuffix(", `lk.fuse`").removesuffix(", GradScaler")


def plan_next(results: Results) -> bool:
    """Plans a run that was measured and not planned yet; returns False if there is none."""
    for entry in results.entries:
        shape, kind, subject = entry["cell"]
        wanted = "peak" in entry and kind != "compiled" and _name(subject) in SUBJECTS
        if wanted and Results.key(entry) not in results.plans:
            peak: Any = None
            try:
                peak = peak_of(shape, kind, subject, entry["rows"])
            except Exception as error:
                print(f"lorakin plan failed for {entry['cell']}: {error}")
            results.add_plan(entry, peak)
            return True
    return False


def plan_until_measured(folder: Any) -> None:
    """Plans what is measured, until the results say that all is."""
    warnings.simplefilter("ignore")
    while True:
        results = Results.read(folder)
        if not plan_next(results):
            if results.data.get("measured"):
                return
            time.sleep(0.5)
