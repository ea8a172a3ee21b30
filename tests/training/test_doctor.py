"""What doctor finds: it fails at nothing, and says nothing private."""

from __future__ import annotations

import getpass
import importlib.metadata
import importlib.util
import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakin.cli.app import run
from lorakin.training import doctor, doctor_checks


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MEASURED_SECONDS", 0.001)


def test_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["packages"]["transformers"] == transformers.__version__
    assert {"train", "quantised"} <= set(doctor._extras().values())
    assert found["auto_dtype"] in ("float32", "bfloat16")
    assert found["speeds"]["float32"] > 1e8
    works = {check["name"]: check["works"] for check in found["checks"]}
    assert works["bitsandbytes"] and works["torchao"]
    if not torch.cuda.is_available():
        assert works["triton"] is works["liger-kernel"] is None
    assert found["advice"] == []


def test_nothing_private(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(where: torch.device) -> None:
        raise OSError(f"{Path.home()}/x.so: no, nor /srv/secret/project/y.so\nmore")

    monkeypatch.setattr(doctor_checks, "_nf4", fails)
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "bitsandbytes" in shown and "y.so" in shown and "OSError" in shown
    assert not re.search(rf"secret|/{getpass.getuser()}/|/tmp|/work", shown)
    assert str(Path.home()) not in shown
    assert platform.node() not in shown


def test_where_everything_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str, *_: Any) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)  # type: ignore[attr-defined]
    found = doctor.diagnose()
    assert set(found.packages.values()) == {None}
    assert sum("lorakin[quantised]" in line for line in found.advice) == 2
    assert any("lorakin[train]" in line and "transformers" in line for line in found.advice)
    assert all(label and text for label, text in found.lines() if label != "packages")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("see https://x.org/a/b and a/b", "see https://x.org/a/b and a/b"),
        ("no /opt/firm/lib.so here", "no …/lib.so here"),
        ("C:\\Users\\me\\x.dll", "…/x.dll"),
    ],
)
def test_paths_keep_their_last_part(text: str, want: str) -> None:
    assert doctor.cleaned(text) == want
