"""Runs of these tests draw no loss curve, which takes longer than their training."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakin.training.metrics_file import Metrics


@pytest.fixture
def pictures() -> None:
    """For tests that look at the loss curve: it is drawn."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(self: Metrics, path: Path) -> None:
        path.write_bytes(b"no picture")

    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(Metrics, "plot", touch)
