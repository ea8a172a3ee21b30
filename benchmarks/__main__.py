"""Compares lorakin with PEFT, the frozen base and full fine-tuning on this machine.

    python -m benchmarks            everything, both shapes and dtypes: about an hour on two cores
    python -m benchmarks --quick    tiny sizes, about a minute: does it run?
    python -m benchmarks steps --shape S --dtype bfloat16 --members lora,dora
    python -m benchmarks --device cuda

Times are ratios: median (lowest–highest). All calls run in one process, interleaved, and every
other round in reverse order. On a CPU one thread works and its own clock counts; with `--threads`
above 1, the wall clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import lorakin
from benchmarks import chores, dispatch, mixed_batch, profiles, report, scaling, steps, whole
from benchmarks.subjects import SHAPES, SUBJECTS, decoder

DTYPES = ("float32", "bfloat16", "float16")
PARTS = (
    "steps",
    "whole",
    "chores",
    "serving",
    "dispatch",
    "accuracy",
    "compiled",
    "scaling",
    "profile",
)


def main() -> None:
    """Measures what was asked for; writes `results.json`, `results.md` and `scaling.png`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: the first two")
    parser.add_argument("--shape", action="append", choices=tuple(SHAPES), help="default: both")
    parser.add_argument("--members", help=f"with commas between, any of: {'; '.join(SUBJECTS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    members = [
        name.strip()
        for name in (arguments.members or ";".join(SUBJECTS)).replace(",", ";").split(";")
    ]
    members = _known(members, parser)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = _earlier(arguments.out, _machine(arguments))
    for path, figures in _measured(arguments, members):
        *outer, last = path
        inner = results
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = figures
        _write(arguments.out, results)  # after each part: a later one may fail
    print(f"{arguments.out}/results.md, {arguments.out}/results.json")


def _earlier(out: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Returns earlier results of the same machine, which a run of some parts adds to."""
    path = out / "results.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return earlier if earlier.get("machine") == machine else {"machine": machine}


def _write(out: Path, results: dict[str, Any]) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(report.markdown(results), encoding="utf-8")
    if "scaling" in results:
        scaling.plot(results["scaling"], out / "scaling.png")


def _known(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Returns the subjects that are meant; "dropout" is lora with dropout."""
    names = {name.replace(",", "").split(" 0")[0]: name for name in SUBJECTS}
    found = []
    for word in dict.fromkeys(words):
        if word.startswith("dropout"):
            word = "lora dropout"
        if word not in names:
            parser.error(f"no member {word!r}; there are {', '.join(names)}")
        found.append(names[word])
    return list(dict.fromkeys(found))


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "device": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else f"{cpu} ({platform.machine()})",
        "threads": arguments.threads,
        "clock": "wall" if arguments.device == "cuda" or arguments.threads > 1 else "thread",
        "versions": {
            "lorakin": lorakin.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _measured(
    arguments: argparse.Namespace, members: list[str]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields each part's figures, with their place in the results, as soon as they are there."""
    quick, device, rounds = (
        arguments.quick,
        arguments.device,
        2 if arguments.quick else arguments.rounds,
    )
    shapes = arguments.shape or (["S"] if quick else list(SHAPES))
    dtypes = arguments.dtype or (["bfloat16"] if quick else ["float32", "bfloat16"])
    parts = arguments.parts or list(PARTS)
    size = {"length": 16, "rows": 1} if quick else {"length": 256, "rows": 4}
    for shape, dtype in (
        itertools.product(shapes, dtypes) if {"steps", "accuracy", "profile"} & set(parts) else ()
    ):
        kind = f"{shape} {dtype}"
        base = decoder(SHAPES[shape], getattr(torch, dtype), device, 1 if quick else None)
        if "steps" in parts:
            yield ("steps", kind), steps.measure(base, members, rounds, **size)
        if "profile" in parts and device == "cpu":
            yield ("profile", kind), profiles.measure(base, members, **size)
        if "accuracy" in parts and shape == "S":  # float64 at the width of W takes minutes
            yield ("accuracy", kind), steps.accuracy(base, members)
    narrow, dtype = getattr(torch, dtypes[-1]), dtypes[-1]
    layers = 1 if quick else 12
    if "whole" in parts:
        depth = 1 if quick else 6
        yield ("whole", dtype), whole.measure("S", depth, narrow, rounds, device, **size)
        variants = ("lorakin", "peft") if quick else whole.VARIANTS
        yield ("peak", dtype), whole.peaks("S", layers, dtype, variants, device)
    if "chores" in parts:
        yield ("chores",), chores.measure(SHAPES["S"], 2 if quick else 30, narrow, rounds, device)
    if "serving" in parts:
        yield ("serving",), mixed_batch.measure(1 if quick else 12, narrow, rounds, device=device)
    if "dispatch" in parts:
        yield ("dispatch",), dispatch.measure(members, narrow, rounds, device)
    for dtype in dtypes if "compiled" in parts and not quick else ():
        base = decoder(SHAPES["S"], getattr(torch, dtype), device, 1)
        wanted = [name for name in members if SUBJECTS[name].theirs and name != "lora+"]
        yield ("compiled", dtype), steps.compiled(base, wanted, 3 * rounds, **size)
    if "scaling" in parts:
        yield ("scaling",), scaling.measure(narrow, 1 if quick else 3, device, 2 if quick else None)


if __name__ == "__main__":
    main()
