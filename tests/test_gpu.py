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
FILES = sorted(path.name for path in (TESTS / "gpu").glob("test_*.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu runs on it")
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ builds the pretended GPU")
@pytest.mark.parametrize("name", FILES)
def test_on_a_pretended_gpu(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "gpu.pretended", "-q", f"tests/gpu/{name}"]
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
