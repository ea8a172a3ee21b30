"""Measures on a real GPU, in 8 minutes at most: the tests, and every method beside PEFT.

    make gpu                                    all of it; the table is gpu-results/results.md
    python -m benchmarks.gpu 135M 1B            some shapes
    python -m benchmarks.gpu tiny --pretended   does it run? On the pretended GPU; no figure counts

Nothing is downloaded: the weights are random, the shapes are SmolLM2's, Llama-3.2-1B's and
Llama-3-8B's (in NF4 on a GPU of less than 40 GiB). All subjects of a shape share one base. A
subject's steps are taken in turns with the frozen base's, and a ratio is of such pairs: median
(lowest–highest). Rows are halved until a step of plain LoRA fits.

The most important figures come first; each is written as soon as it is there. A cell that fails, or
that kills its process, is written as failed, and the rest goes on. What did not fit into the time is
named.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from benchmarks.gpu_results import Results

ROOT = Path(__file__).parents[1]
NAMES = ("tiny", "135M", "1B", "8B")
TESTS_SHARE = 0.4
"""Of the time; tests that take longer are ended."""
DIED = "its process died"


def main(words: Sequence[str] | None = None) -> int:
    """Runs the tests, then workers until all is measured or the time is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--pretended", action="store_true", help="use the pretended GPU")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--planner", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if unknown := [shape for shape in arguments.shapes if shape not in NAMES]:
        parser.error(f"no shape {unknown[0]!r}; there are {', '.join(NAMES)}")
    if arguments.worker:
        return work(arguments)
    if arguments.planner:
        from benchmarks.gpu_plans import plan_until_measured

        plan_until_measured(arguments.out)
        return 0

    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "plans.json").unlink(missing_ok=True)
    results = Results(arguments.out, {})
    results.write()
    if not arguments.no_tests:
        results.data["tests"] = tested(60 * arguments.minutes * TESTS_SHARE, arguments.pretended)
        results.write()
        print(f"tests/gpu: {results.data['tests']}", flush=True)
    with planning(arguments, deadline):
        supervise(arguments, deadline)
    Results.read(arguments.out).write()  # with the last plans
    print((arguments.out / "results.md").read_text(encoding="utf-8"))
    done = Results.read(arguments.out).data
    measured = any("ratio" in entry for entry in done.get("cells", []))
    return 0 if measured and "failed" not in done.get("tests", "") else 1


def tested(seconds: float, pretended: bool) -> str:
    """Runs the tests of tests/gpu, and returns what pytest says last."""
    command = [sys.executable, "-m", "pytest", "-q", "--numprocesses", "4", "tests/gpu"]
    command += ["-p", "gpu.pretended"] if pretended else []
    with tempfile.TemporaryFile("w+") as said:
        if run_for(command, seconds, said) is None:
            return f"not finished in {seconds:.0f} s"
        said.seek(0)
        lines = said.read().strip().splitlines() or ["failed, and said nothing"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "; ".join([lines[-1].strip("= "), *failed[:20]])


def run_for(
    command: Sequence[str],
    seconds: float,
    output: IO[str] | None = None,
    without_gpu: bool = False,
) -> int | None:
    """Returns the exit status of a command; None if it was ended because it took longer."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            **({"CUDA_VISIBLE_DEVICES": ""} if without_gpu else {}),
        },
    )  # fmt: skip
    try:
        return process.wait(max(seconds, 0.0))
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as ended:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it began
        process.wait()
        if isinstance(ended, KeyboardInterrupt):
            raise
        return None


@contextlib.contextmanager
def planning(arguments: argparse.Namespace, deadline: float) -> Iterator[None]:
    """Lets another process plan inside a `with` block, and until it is done or the time is over."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--planner", "--out"]
    planner = threading.Thread(
        target=lambda: run_for(
            [*command, str(arguments.out.resolve())], deadline - time.monotonic(), without_gpu=True
        )
    )
    planner.start()
    try:
        yield
    finally:
        results = Results.read(arguments.out)
        results.data["measured"] = True
        results.write()
        planner.join()


def supervise(arguments: argparse.Namespace, deadline: float) -> None:
    """Runs workers until all cells are done or the time is over.

    A worker whose process died is followed by another, but not if it had measured nothing.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments.shapes, "--worker"]
    command += ["--out", str(arguments.out.resolve()), "--rounds", str(arguments.rounds)]
    command += ["--pretended"] if arguments.pretended else []
    before = 0
    while (status := run_for(command, deadline - time.monotonic())) is not None:
        results = Results.read(arguments.out)
        results.fail_begun(DIED)
        done = sum(entry["state"] == "done" for entry in results.data.get("cells", []))
        if status == 0 or done == before:
            return
        before = done


def work(arguments: argparse.Namespace) -> int:
    """Measures, in a process of its own; returns 3 if another must go on."""
    if arguments.pretended:
        import gpu.pretended  # noqa: F401 - before torch
    import torch

    from benchmarks import gpu_cells

    if not torch.cuda.is_available():
        print("torch sees no GPU; --pretended shows whether this runs", file=sys.stderr)
        return 0
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    results = Results.read(arguments.out)
    results.data["machine"] = machine(properties.name, memory)
    results.plan(gpu_cells.cells(arguments.shapes or list(NAMES[1:]), memory))
    worker = gpu_cells.Worker(results, arguments.rounds, arguments.pretended)
    return 0 if worker.work() else 3


def machine(name: str, memory: float) -> str:
    """Returns the GPU, its driver, and the versions, in one line."""
    import importlib.metadata

    import torch

    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    versions = {"CUDA": torch.version.cuda}
    for package in ("lorakin", "torch", "triton", "transformers", "peft", "bitsandbytes"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    listed = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f"{name}, {memory:.0f} GiB, driver {driver}; {listed}"


if __name__ == "__main__":
    sys.exit(main())
