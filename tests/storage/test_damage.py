"""One flipped bit anywhere: what is damaged is refused, and the base is checked all the same."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

import lorakin as lk
from conftest import randomise, tiny_llama
from lorakin.storage import directory
from lorakin.storage.summary import summarise

PARTS = ("lorakin.json", "adapter_model.safetensors", "lorakin.safetensors", "adapter_config.json")


def other_base() -> Any:
    """The same architecture with other weights."""
    model = tiny_llama()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has all four files."""
    model = tiny_llama()
    adapter = lk.adapt(model, [lk.DeltaLoRA(rank=2, start_step=1), lk.DoRA()], "q_proj", seed=0)
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.1)
    ids = torch.arange(3, 12).unsqueeze(0)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter.save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.mark.parametrize("part", PARTS)
def test_no_flipped_bit_lets_another_base_pass(part: str, folder: Path) -> None:
    model, whole, chance = other_base(), (folder / part).read_bytes(), random.Random(3)
    with pytest.raises(lk.AdapterError):
        lk.load(model, folder)
    for _ in range(80):
        flip(folder / part, chance.randrange(8 * len(whole)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lk.LorakinWarning)
            with pytest.raises(lk.LorakinError):
                lk.load(model, folder)
        (folder / part).write_bytes(whole)
    assert not lk.adapters(model)


@pytest.mark.filterwarnings(
    "ignore::lorakin.errors.LorakinWarning"
)  # a digest in it that is of no file is said first
@pytest.mark.parametrize("part", ["lorakin.json", "lorakin.safetensors"])
def test_every_flipped_bit_in_lorakins_own_part_is_refused(part: str, folder: Path) -> None:
    """On the right base, where nothing else would speak against it.

    `inspect` does not take it either.
    """
    model, whole, chance = tiny_llama(), (folder / part).read_bytes(), random.Random(4)
    for _ in range(80):
        flip(folder / part, chance.randrange(8 * len(whole)))
        with pytest.raises(lk.AdapterError):
            lk.load(model, folder)
        with pytest.raises(lk.AdapterError):
            summarise(folder)
        (folder / part).write_bytes(whole)
    lk.load(model, folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda own: own.update(bate=own.pop("base")),
        lambda own: own.update(base=None),
        lambda own: own.pop("base"),
        lambda own: own["base"].pop("model_type"),
        lambda own: own["base"]["weights"].clear(),
        lambda own: own["base"]["weights"].popitem(),
        lambda own: own.update(beside={}),
    ],
)
def test_an_edited_lorakin_json_is_refused(change: Any, folder: Path) -> None:
    own = json.loads((folder / "lorakin.json").read_text())
    change(own)
    (folder / "lorakin.json").write_text(json.dumps(own))
    with pytest.raises(lk.AdapterError):
        lk.load(tiny_llama(), folder)


def test_another_layout_of_the_same_words_is_no_damage(folder: Path) -> None:
    own = json.loads((folder / "lorakin.json").read_text())
    (folder / "lorakin.json").write_text(json.dumps(dict(reversed(own.items())), indent=8))
    lk.load(tiny_llama(), folder)


def test_earlier_files_have_no_checksum(folder: Path) -> None:
    own = json.loads((folder / "lorakin.json").read_text())
    del own["sha256"]
    (folder / "lorakin.json").write_text(json.dumps(own))
    lk.load(tiny_llama(), folder)
    with pytest.raises(lk.AdapterError):
        lk.load(other_base(), folder)


def test_what_peft_wrote_over_ours_is_still_for_that_base(folder: Path) -> None:
    """Also in the old form, a `.bin`, where the file that lorakin wrote is gone."""
    other = randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=3), targets="v_proj")).save(
        folder.parent / "other"
    )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((other / name).read_bytes())
    for _ in range(2):
        with pytest.warns(lk.LorakinWarning, match="lorakin.json"):
            assert lk.load(tiny_llama(), folder).method.words == "lora"
        with (
            pytest.warns(lk.LorakinWarning, match="lorakin.json"),
            pytest.raises(lk.AdapterError),
        ):
            lk.load(other_base(), folder)
        with pytest.warns(lk.LorakinWarning, match="lorakin.json"):
            lk.load(other_base(), folder, other_base=True)
        if (folder / "adapter_model.safetensors").exists():
            torch.save(
                safetensors.torch.load_file(folder / "adapter_model.safetensors"),
                folder / "adapter_model.bin",
            )
            (folder / "adapter_model.safetensors").unlink()


def test_training_does_not_go_on_from_tensors_that_training_did_not_write(tmp_path: Path) -> None:
    """An AdaLoRA whose schedule is lost would keep every rank that it began with."""
    member = lk.AdaLoRA(initial_rank=6, target_rank=3, start=1, finish=2, total_steps=4)
    model, ids = tiny_llama(), torch.arange(3, 12).unsqueeze(0)
    adapter = lk.adapt(model, member, "q_proj", seed=0)
    optimizer = adapter.optimizer(torch.optim.SGD, lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lk.LorakinWarning)
        adapter.save(tmp_path)
    flip(
        tmp_path / "adapter_model.safetensors",
        8 * (tmp_path / "adapter_model.safetensors").stat().st_size - 20,
    )
    again = lk.adapt(tiny_llama(), member, "q_proj", seed=1)
    before = [p.clone() for p in again.parameters()]
    with (
        pytest.warns(lk.LorakinWarning, match="lorakin.json"),
        pytest.raises(lk.AdapterError),
    ):
        again.restore(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("member", "change"),
    [
        (lk.LoRA(rank=4, alpha=32), {"lora_alpha": 72}),
        (lk.LoRA(rank=4, alpha=32), {"lora_dropout": 0.5}),
        (lk.LoRA(rank=4, rslora=True), {"use_rslora": False}),
        (
            lk.AdaLoRA(initial_rank=4, target_rank=2, start=1, finish=2, total_steps=9),
            {"lora_alpha": 33},
        ),
        (
            lk.AdaLoRA(initial_rank=4, target_rank=2, start=1, finish=2, total_steps=9),
            {"orth_reg_weight": 0.2},
        ),
        (lk.VeRA(rank=4), {"projection_prng_key": 1}),
    ],
)
def test_a_setting_that_is_not_the_one_that_was_saved_is_refused(
    member: Any, change: dict[str, Any], tmp_path: Path
) -> None:
    directory.save(lk.adapt(tiny_llama(), member, "q_proj"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    model = tiny_llama()
    with pytest.raises(lk.AdapterError):
        lk.load(model, tmp_path)
    assert not lk.adapters(model)
    with pytest.raises(lk.AdapterError):
        summarise(tmp_path)


def test_every_flipped_bit_in_a_number_of_the_config_is_refused_or_changes_nothing(
    tmp_path: Path,
) -> None:
    randomise(lk.adapt(tiny_llama(), lk.LoRA(rank=4, alpha=32), "q_proj")).save(tmp_path)
    file, ids = tmp_path / "adapter_config.json", torch.arange(3, 12).unsqueeze(0)
    whole, model = file.read_bytes(), tiny_llama()
    adapter = lk.load(model, tmp_path)
    right = model(ids).logits
    adapter.remove()
    at = whole.index(b'"lora_alpha"')
    for bit in range(8 * at, 8 * whole.index(b"\n", at)):
        flip(file, bit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lk.LorakinWarning)
            try:
                adapter = lk.load(model, tmp_path)
            except lk.AdapterError:
                pass
            else:
                assert torch.equal(model(ids).logits, right), bit
                adapter.remove()
        file.write_bytes(whole)


def test_a_config_that_peft_wrote_anew_is_the_same(tmp_path: Path) -> None:
    """With more modules than PEFT names one by one, and PEFT's own defaults beside ours."""
    randomise(lk.adapt(tiny_llama(num_hidden_layers=4), lk.LoRA(rank=4, alpha=12))).save(tmp_path)
    before = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = peft.PeftModel.from_pretrained(tiny_llama(num_hidden_layers=4), str(tmp_path))
    theirs.peft_config["default"].save_pretrained(str(tmp_path))
    now = json.loads((tmp_path / "adapter_config.json").read_text())
    assert now != before and now["peft_version"]
    assert lk.load(tiny_llama(num_hidden_layers=4), tmp_path).method.words == "lora"


def test_earlier_files_do_not_hold_the_config(folder: Path) -> None:
    own = json.loads((folder / "lorakin.json").read_text())
    del own["config"], own["sha256"]
    (folder / "lorakin.json").write_text(json.dumps(own))
    lk.load(tiny_llama(), folder)
