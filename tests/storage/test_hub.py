"""Adapters by hub id, with huggingface_hub's own client and a stand-in for the hub."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakin as lk
from conftest import randomise, tiny_llama
from hub_stand_in import TOKEN, Hub, hub_on_this_machine
from lorakin.cli.app import run
from lorakin.errors import AdapterError, LorakinWarning, OutputError, SettingError
from lorakin.storage import card
from lorakin.storage.hub import adapter_directory

constants = pytest.importorskip("huggingface_hub").constants


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_on_this_machine(tmp_path / "cache", monkeypatch) as made:
        yield made


def composed(model: Any, seed: int = 1) -> lk.Adapter:
    """An adapter that PEFT has no form for, so that lorakin.safetensors counts."""
    return randomise(lk.adapt(model, [lk.VeRA(rank=4), lk.DoRA()]), seed=seed)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = composed(tiny_llama()).save(tmp_path / "adapter")
    (folder / "recipe.yaml").write_text("model: m\n")
    (folder / "optimizer.pt").write_bytes(b"no adapter's file")
    assert (folder / "lorakin.safetensors").exists()
    return folder


def test_it_is_fetched_whole_and_nothing_else_is(hub: Hub, saved: Path, ids: Tensor) -> None:
    hub.put("org/adapter", saved)
    here, there = tiny_llama(), tiny_llama()
    lk.load(here, saved)
    adapter = lk.load(there, "org/adapter")
    assert torch.equal(here(ids).logits, there(ids).logits)
    assert adapter.method.words == "vera,dora"
    found = adapter_directory("org/adapter")
    assert {p.name: p.read_bytes() for p in found.iterdir()} == {
        p.name: p.read_bytes() for p in saved.iterdir() if p.name != "optimizer.pt"
    }
    hub.asked.clear()
    constants.HF_HUB_OFFLINE = True  # put back by the fixture
    assert adapter_directory("org/adapter") == found and not hub.asked


def test_a_revision_and_a_subfolder(hub: Hub, saved: Path, tmp_path: Path) -> None:
    other = composed(tiny_llama(), seed=2).save(tmp_path / "other")
    hub.put("org/adapter", saved, inside="one/two/")
    hub.put("org/adapter", other, revision="v2")
    assert (adapter_directory("org/adapter", revision="v2") / card.CARD).is_file()
    inner = adapter_directory("org/adapter", subfolder="one/two")
    assert (inner / "adapter_model.safetensors").read_bytes() == (
        saved / "adapter_model.safetensors"
    ).read_bytes()
    assert lk.load(tiny_llama(), "org/adapter", subfolder="one/two/").is_active
    commit = hub.commit("org/adapter", "v2")
    assert adapter_directory("org/adapter", revision=commit) == adapter_directory(
        "org/adapter", revision="v2"
    )
    assert lk.load(tiny_llama(), saved.parent, subfolder=saved.name).is_active  # of a directory too
    for wrong in ("../adapter", "/etc", "a\\b"):
        with pytest.raises(SettingError, match="subfolder"):
            adapter_directory("org/adapter", subfolder=wrong)


def test_older_tensors_are_fetched_only_in_need(hub: Hub, saved: Path) -> None:
    (saved / "adapter_model.bin").write_bytes(b"another")
    hub.put("org/both", saved)
    assert not (adapter_directory("org/both") / "adapter_model.bin").exists()
    (saved / "adapter_model.safetensors").unlink()
    hub.put("org/old", saved)
    assert (adapter_directory("org/old") / "adapter_model.bin").read_bytes() == b"another"


def test_a_directory_wins_and_asks_nothing(
    hub: Hub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    saved.rename(tmp_path / "org" / "adapter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # it is not even imported
    adapter = lk.load(tiny_llama(), "org/adapter", trainable=True)
    adapter.save("org/adapter")
    with pytest.warns(LorakinWarning, match="v2"):
        lk.load(tiny_llama(), "org/adapter", revision="v2")
    for path in (Path("org/none"), "none", "a/b/c", "./org/none"):
        with pytest.raises(AdapterError):
            lk.load(tiny_llama(), path)
    with pytest.raises(AdapterError, match=r"org/none.*pip install huggingface_hub"):
        lk.load(tiny_llama(), "org/none")
    with pytest.raises(OutputError, match="pip install huggingface_hub"):
        adapter.push_to_hub("org/none")
    assert not hub.asked


def test_each_failure_is_said(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("org/adapter", saved)
    hub.put("org/nested", saved, inside="inner/")
    hub.repos["org/model"] = {"main": {"config.json": b"{}", "model.safetensors": b""}}
    hub.repos["org/half"] = {"main": {"adapter_config.json": b"{}"}}
    hub.put("org/gated", saved)
    hub.gated.add("org/gated")
    hub.put("org/private", saved)
    hub.private["org/private"] = True
    model = tiny_llama()

    def refused(name: str, *words: str, **options: Any) -> None:
        with pytest.raises(AdapterError) as caught:
            lk.load(model, name, **options)
        assert all(word in str(caught.value) for word in (name, *words)), str(caught.value)
        assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
        assert not lk.adapters(model)

    refused("org/none", "no repository", "hf auth login")
    refused("org/private", "private", "token=")
    refused("org/gated", "gated", f"{hub.url}/org/gated")
    refused("org/adapter", "no revision 'v9'", revision="v9")
    refused("org/model", "adapter_config.json", "whole model")
    refused("org/half", "adapter_model.safetensors")
    refused("org/nested", "'inner'", "subfolder=")
    refused("org/nested", "subfolder outer", subfolder="outer")
    assert lk.load(tiny_llama(), "org/private", token=TOKEN).is_active
    assert lk.load(tiny_llama(), "org/gated", token=TOKEN).is_active
    hub.down = True
    refused("org/nested2", "503")
    hub.down = False
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("org/fresh", "HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    refused("org/fresh", "cannot be reached", "network")


def test_a_cache_that_another_program_filled_is_warned_of(
    hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT fetches its two files alone.

    Offline nobody can know whether there were lorakin's too.
    """
    from huggingface_hub import hf_hub_download

    hub.put("org/adapter", saved)
    knows = hasattr(sys.modules["huggingface_hub"], "get_cached_repo_tree")
    hf_hub_download("org/adapter", "adapter_config.json")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(AdapterError, match="org/adapter.*a part" if knows else "org/adapter"):
            adapter_directory("org/adapter")
    hf_hub_download("org/adapter", "adapter_model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if knows:
        with pytest.warns(LorakinWarning, match=r"lorakin\.json"):
            adapter_directory("org/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (adapter_directory("org/adapter") / "lorakin.json").exists()


def test_the_commands_take_a_hub_id(
    hub: Hub, tmp_path: Path, model_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakin.training.models import load_model

    folder = composed(load_model(model_dir, "float32").model).save(tmp_path / "adapter")
    hub.put("org/adapter", folder)
    assert run(["inspect", "org/adapter"]) == 0
    assert "vera" in capsys.readouterr().out
    hub.put(
        "org/plain",
        randomise(lk.adapt(load_model(model_dir, "float32").model, lk.LoRA(2))).save(
            tmp_path / "plain"
        ),
    )
    assert (
        run(["combine", "org/plain=1.0", "--model", model_dir, "--out", str(tmp_path / "sum")]) == 0
    )
    assert (
        run(
            [
                "export",
                "org/adapter",
                "--model",
                model_dir,
                "--to",
                "merged",
                "--out",
                str(tmp_path / "merged"),
            ]
        )
        == 0
    )
    capsys.readouterr()
    answers = []
    for name in ("org/adapter", str(folder)):
        assert (
            run(
                [
                    "generate",
                    "--model",
                    model_dir,
                    "--adapter",
                    name,
                    "--prompt",
                    "the cat",
                    "--max-new-tokens",
                    "4",
                ]
            )
            == 0
        )
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert run(["inspect", "org/none"]) == 2
    assert "org/none" in capsys.readouterr().err


def test_an_upload_is_what_save_writes(hub: Hub, tmp_path: Path, ids: Tensor) -> None:
    model = tiny_llama()
    adapter = composed(model)
    info = adapter.push_to_hub(
        "org/mine", private=True, token=TOKEN, commit_message="first", notes={"Data": "rows"}
    )
    assert str(info).startswith(f"{hub.url}/org/mine/commit/") and hub.private["org/mine"]
    files = hub.repos["org/mine"]["main"]
    local = {
        p.name: p.read_bytes()
        for p in adapter.save(tmp_path / "local", notes={"Data": "rows"}).iterdir()
    }
    readme, other = files.pop(card.CARD).decode(), local.pop(card.CARD)
    assert files == local
    assert (
        'lk.load(model, "org/mine")' in readme
        and b"org/mine" not in other
        and card.is_generated(readme)
    )
    files[card.CARD] = readme.encode()
    again = tiny_llama()
    lk.load(again, "org/mine", token=TOKEN)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_an_upload_replaces_an_adapter_and_leaves_what_a_person_wrote(hub: Hub) -> None:
    composed(tiny_llama()).push_to_hub("org/mine", token=TOKEN)
    files = hub.repos["org/mine"]["main"]
    files |= {"notes.txt": b"mine", "adapter_model.bin": b"stale"}
    first = files[card.CARD]
    plain = randomise(lk.adapt(tiny_llama(), lk.LoRA(2)))
    plain.push_to_hub("org/mine", token=TOKEN)
    assert set(files) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorakin.json",
        "README.md",
        "notes.txt",
    }
    assert files[card.CARD] != first
    files[card.CARD] = b"# My own\n"
    composed(tiny_llama()).push_to_hub("org/mine", token=TOKEN)
    assert files[card.CARD] == b"# My own\n" and "lorakin.safetensors" in files
    plain.push_to_hub("org/mine", token=TOKEN, revision="try")
    assert "lorakin.safetensors" in hub.repos["org/mine"]["main"]
    assert "lorakin.safetensors" not in hub.repos["org/mine"]["try"]
    plain.push_to_hub("alone", token=TOKEN)
    assert "adapter_config.json" in hub.repos["me/alone"]["main"]


def test_an_upload_that_fails_says_why(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = randomise(lk.adapt(tiny_llama(), lk.LoRA(2)))

    def refused(name: str, *words: str, **options: Any) -> None:
        with pytest.raises(OutputError) as caught:
            adapter.push_to_hub(name, **options)
        assert all(word in str(caught.value) for word in (name, *words)), str(caught.value)
        assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)

    refused("org/mine", "token", "hf auth login")
    refused("others/mine", "rights", token=TOKEN)
    refused("not an id!", token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("org/mine", "HF_HUB_OFFLINE", token=TOKEN)
    assert not hub.repos
    untrained = lk.adapt(tiny_llama(), lk.AdaLoRA())
    with pytest.raises(lk.StateError):
        untrained.push_to_hub("org/mine", token=TOKEN)
