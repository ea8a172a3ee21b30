"""`lorakin push`, with huggingface_hub's own client and a stand-in for the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lorakin as lk
from conftest import randomise, tiny_llama
from hub_stand_in import TOKEN, Hub, hub_on_this_machine
from lorakin.cli.app import run
from lorakin.storage import card

constants = pytest.importorskip("huggingface_hub").constants


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_on_this_machine(tmp_path / "cache", monkeypatch) as made:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = tiny_llama()
    folder = randomise(lk.adapt(model, [lk.VeRA(rank=4), lk.DoRA()])).save(tmp_path / "adapter")
    (folder / "recipe.yaml").write_text("model: m\n")
    (folder / "optimizer.pt").write_bytes(b"no adapter's file")
    (folder / "checkpoints" / "1").mkdir(parents=True)
    (folder / "checkpoints" / "1" / "adapter_config.json").write_text("{}")
    return folder


def test_an_adapter_goes_up_as_it_is(
    hub: Hub, adapter: Path, ids: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["push", str(adapter), "org/mine", "--private", "--message", "first"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/org/mine/commit/")
    assert hub.private["org/mine"]
    files = hub.repos["org/mine"]["main"]
    local = {p.name: p.read_bytes() for p in adapter.iterdir() if p.is_file()}
    del local["optimizer.pt"]
    readme, own = files[card.CARD].decode(), local.pop(card.CARD).decode()
    assert {name: files[name] for name in local} == local and len(files) == len(local) + 1
    assert card.is_generated(readme) and 'lk.load(model, "org/mine")' in readme
    assert readme.count("org/mine") == own.count(card.ANYWHERE) == 2
    assert (adapter / card.CARD).read_text() == own

    here, there = tiny_llama(), tiny_llama()
    lk.load(here, adapter)
    lk.load(there, "org/mine")
    assert torch.equal(here(ids).logits, there(ids).logits)


def test_a_card_that_a_person_wrote_stays(hub: Hub, adapter: Path) -> None:
    (adapter / card.CARD).write_text("# Mine, path/to/this/directory\n")
    assert run(["push", str(adapter), "org/mine"]) == 0
    assert hub.repos["org/mine"]["main"][card.CARD] == b"# Mine, path/to/this/directory\n"
    assert not hub.private["org/mine"]
    (adapter / card.CARD).write_text("# Another\n")
    assert run(["push", str(adapter), "org/mine"]) == 0
    assert hub.repos["org/mine"]["main"][card.CARD] == b"# Mine, path/to/this/directory\n"


def test_a_model_goes_up_without_what_was_there(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    tiny_llama().save_pretrained(folder)
    (folder / "export.json").write_text('{"order": {"model": "org/base"}}')
    assert run(["push", str(folder), "org/model"]) == 0
    files = hub.repos["org/model"]["main"]
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert set(files) == {"config.json", "generation_config.json", "model.safetensors", card.CARD}
    assert b'base_model: "org/base"' in files[card.CARD]
    files["model-00001-of-00002.safetensors"] = b"stale"
    files["notes.txt"] = b"mine"
    assert run(["push", str(folder), "org/model"]) == 0
    assert "model-00001-of-00002.safetensors" not in files and "notes.txt" in files


def test_gguf_files_go_up(hub: Hub, tmp_path: Path) -> None:
    for name in ("adapter.gguf", "Modelfile", "export.json", ".hidden.gguf"):
        (tmp_path / name).write_bytes(b"content")
    assert run(["push", str(tmp_path), "org/gguf"]) == 0
    assert set(hub.repos["org/gguf"]["main"]) == {"adapter.gguf", "Modelfile", card.CARD}


def test_what_cannot_go_up_is_refused_before_it_is_read(
    hub: Hub,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(folder: Path, name: str, *words: str) -> None:
        assert run(["push", str(folder), name]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert said.startswith("error: ") and all(word in said for word in words), said
        assert TOKEN not in said

    refused(tmp_path / "none", "org/mine", "none")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "org/mine", "adapter_config.json")
    assert not hub.asked

    damaged = adapter / "adapter_model.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:100])
    refused(adapter, "org/mine", "tensors")
    # What follows is said first, so the file is not read.
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    refused(adapter, "org/mine", "token", "hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    refused(adapter, "org/mine", "token", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.down = True
    refused(adapter, "org/mine", "503")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(adapter, "org/mine", "HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.down = False
    damaged.write_bytes(content)
    refused(adapter, "others/mine", "rights")
    refused(adapter, "not an id!", "not an id!")
    assert not hub.repos
