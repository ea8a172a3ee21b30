"""Measures a whole model with embeddings, head and loss: the time and peak memory of a step.

`fused` is lorakin with `lorakin.fuse` (norms, gated activations and loss in less memory), and
`fused frozen` is the same without an adapter, to tell the two effects apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import lorakin as lk
from benchmarks.measure import interleaved, ratio
from benchmarks.subjects import SHAPES, SUBJECTS, config, ours, theirs, twin

VARIANTS = ("frozen", "fused frozen", "lorakin", "fused", "peft", "peft narrow")


def model(shape: str, layers: int, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Returns a frozen causal model with random weights, a tied head and SmolLM2's vocabulary."""
    torch.manual_seed(0)
    tied = config(SHAPES[shape], layers, 49_152, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(tied).to(device, dtype).train().requires_grad_(False)


def variant(base: Any, name: str, member: str = "lora") -> Any:
    """Returns one of `VARIANTS` of the model."""
    if name.startswith("peft"):
        return theirs(base, SUBJECTS[member], narrow=name == "peft narrow")
    changed = twin(base) if name.endswith("frozen") else ours(base, SUBJECTS[member])[0]
    if name.startswith("fused"):
        lk.fuse(changed)
    return changed


def step(changed: Any, rows: int = 4, length: int = 256) -> Callable[[], None]:
    """Returns a function that runs forward and backward.

    The embeddings want gradients, so that a frozen model has a backward too.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49_152, (rows, length), generator=generator).to(
        next(changed.parameters()).device
    )
    embeddings = changed.get_input_embeddings()

    def run() -> None:
        inputs = embeddings(ids).detach().requires_grad_()
        changed(inputs_embeds=inputs, labels=ids).loss.backward()
        changed.zero_grad()

    return run


def measure(
    shape: str,
    layers: int,
    dtype: torch.dtype,
    rounds: int,
    device: str = "cpu",
    rows: int = 4,
    length: int = 256,
) -> list[dict[str, Any]]:
    """Returns a row for each variant: time over the frozen model's, by clock."""
    base = model(shape, layers, dtype, device)
    steps = {name: step(variant(base, name), rows, length) for name in VARIANTS}
    seconds = interleaved(steps, rounds, device)
    table = []
    for name in VARIANTS[1:]:
        table.append(
            {"variant": name, **{clock: ratio(seconds[clock], name, "frozen") for clock in seconds}}
        )
        print(name, table[-1]["thread"], "wall", table[-1]["wall"], flush=True)
    return table


def peaks(
    shape: str, layers: int, dtype: str, variants: Sequence[str] = VARIANTS, device: str = "cpu"
) -> dict[str, float]:
    """Returns variant → MiB over idle at the peak of a step, each in a process of its own."""
    found = {}
    for name in variants:
        order = json.dumps([shape, layers, dtype, name, device])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.whole", order],
            capture_output=True,
            text=True,
            check=True,
        )
        found[name] = float(done.stdout.split()[-1])
        print(name, f"{found[name]:.0f} MiB", flush=True)
    return found


def _peak(shape: str, layers: int, dtype: str, name: str, device: str) -> float:
    base = model(shape, layers, getattr(torch, dtype), device)
    changed = variant(base, name)
    step(changed, 1, 8)()  # libraries set things up in the first step
    run = step(changed)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - idle) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    idle = _status("VmRSS")
    run()
    return (_status("VmHWM") - idle) / 2**10


def _status(key: str) -> int:
    """Returns a figure of the kernel in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_peak(*json.loads(sys.argv[1])))
