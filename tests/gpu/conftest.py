"""Tests that need a GPU: they run on a real one, or in a process with the pretended one."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
