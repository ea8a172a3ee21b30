"""The tests that need a GPU, on a pretended one, in processes of their own.

On a machine with a GPU they run on that, as all other tests do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
FILES = sorted(f"tests/gpu/{path.name}" for path in (TESTS / "gpu").glob("test_*.py"))
PROCESSES = 4
"""Several files in each: a process takes seconds to import torch."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu runs on it")
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ builds the pretended GPU")
@pytest.mark.parametrize("part", range(PROCESSES))
def test_on_a_pretended_gpu(part: int) -> None:
    files = FILES[part::PROCESSES]
    command = [sys.executable, "-m", "pytest", "-p", "gpu.pretended", "-q", *files]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
