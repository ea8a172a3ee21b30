"""Files name a member by its word; if it is another package's, they say which one to install."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakin as lk
from conftest import randomise, tiny_llama
from lorakin.family import registry

CODE = '''
from dataclasses import dataclass
from typing import ClassVar

import lorakin as lk


@lk.register
@dataclass(frozen=True)
class Halved(lk.LoRA):
    """LoRA with half the scale."""

    word: ClassVar[str] = "halved"

    @property
    def scaling(self) -> float:
        return super().scaling / 2
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed distribution `halved-lora` with a module that registers a member."""
    site = tmp_path / "site"
    info = site / "halved_lora-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "halved_lora.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halved-lora\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("halved_lora\n")
    (info / "RECORD").write_text("halved_lora.py,,\n")
    monkeypatch.syspath_prepend(site)
    importlib.import_module("halved_lora")
    yield "halved-lora"
    registry._MEMBERS.pop("halved", None)
    sys.modules.pop("halved_lora", None)


def test_it_is_saved_and_loaded(package: str, tmp_path: Path, ids: Tensor) -> None:
    model, other = tiny_llama(), tiny_llama()
    member: Any = registry.member_named("halved")
    randomise(lk.adapt(model, member(rank=2), "q_proj")).save(tmp_path / "a")
    entry = json.loads((tmp_path / "a" / "lorakin.json").read_text())["members"][0]
    assert entry["member"] == "halved"
    assert entry["package"] == package
    assert lk.load(other, tmp_path / "a").method.words == "halved"
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_without_the_package_the_error_names_it(package: str, tmp_path: Path) -> None:
    member: Any = registry.member_named("halved")
    randomise(lk.adapt(tiny_llama(), member(rank=2), "q_proj")).save(tmp_path / "a")
    registry._MEMBERS.pop("halved")
    model = tiny_llama()
    with pytest.raises(lk.AdapterError, match="pip install halved-lora"):
        lk.load(model, tmp_path / "a")
    assert not lk.adapters(model)


def test_lorakins_own_members_name_no_package(tmp_path: Path) -> None:
    randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=2), "q_proj")).save(tmp_path)
    assert "package" not in json.loads((tmp_path / "lorakin.json").read_text())["members"][0]


def test_a_member_that_no_package_has(package: str, tmp_path: Path) -> None:
    member: Any = registry.member_named("halved")
    randomise(lk.adapt(tiny_llama(), member(rank=2), "q_proj")).save(tmp_path)
    said = json.loads((tmp_path / "lorakin.json").read_text())
    del said["members"][0]["package"], said["sha256"]
    (tmp_path / "lorakin.json").write_text(json.dumps(said))
    registry._MEMBERS.pop("halved")
    with pytest.raises(lk.AdapterError, match=r"'halved'.*register"):
        lk.load(tiny_llama(), tmp_path)
