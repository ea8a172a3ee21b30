"""Numbers that PEFT's file has are not written again, and are read back to the same bits."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import lorakin as lk
from conftest import MEMBERS, randomise, tiny_llama, tiny_mixtral
from lorakin.family import member_named, refusal_of_members
from lorakin.storage import directory
from lorakin.storage.references import Packing, TensorReference, unpacked
from lorakin.storage.schema import SchemaError

OURS, THEIRS = "lorakin.safetensors", "adapter_model.safetensors"
METHODS = [(word,) for word in MEMBERS] + [
    pair
    for pair in itertools.combinations(MEMBERS, 2)
    if refusal_of_members(*map(member_named, pair)) is None
]
TARGETS = ["q_proj", "v_proj"]


def made(words: tuple[str, ...], alpha: float | None) -> list[Any]:
    """The members; where one brings a pair of its own, the others leave its rank to it."""
    brings_pair = next((word for word in ("vera", "adalora") if word in words), None)
    members = []
    for word in words:
        member = MEMBERS[word]()
        if brings_pair and word != brings_pair:
            ranks = {"rank", "initial_rank"} & member.setting_names()
            member = dataclasses.replace(member, **dict.fromkeys(ranks))
        if alpha is not None and "vera" not in words:
            member = dataclasses.replace(member, alpha=alpha)
        members.append(member)
    return members


def trained(words: tuple[str, ...], alpha: float | None = None) -> lk.Adapter:
    """An adapter after a few steps, with this alpha or the members' own."""
    model, ids = tiny_llama(), torch.arange(3, 12)[None]
    batch = {"input_ids": ids, "labels": ids}
    probe = [batch] if "lora-drop" in words else None
    adapter = lk.adapt(model, made(words, alpha), TARGETS, seed=0, probe=probe)
    optimizer = adapter.optimizer(lr=0.01, total_steps=6)
    for _ in range(6):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter


def windows(matrix: Tensor, like: Tensor) -> Iterator[Tensor]:
    """All ranges of rows and of columns of `matrix` that are as large as `like`."""
    (rows, columns), (all_rows, all_columns) = like.shape, matrix.shape
    if columns == all_columns:
        yield from (matrix[n : n + rows] for n in range(all_rows - rows + 1))
    if rows == all_rows:
        yield from (matrix[:, n : n + columns] for n in range(all_columns - columns + 1))


def as_matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]


def twice(folder: Path) -> list[str]:
    """The tensors of lorakin's file whose bits are in PEFT's tensors of the same module."""
    if not (folder / OURS).exists():
        return []
    ours, theirs = (safetensors.torch.load_file(folder / name) for name in (OURS, THEIRS))
    found = []
    for name, tensor in ours.items():
        paths = [part for part in name.split("/") if "." in part]
        for key, there in theirs.items():
            is_near = any(f".{path.rpartition('.')[0]}." in f".{key}" for path in paths)
            if not is_near or not tensor.numel() or tensor.dtype != there.dtype:
                continue
            for like in (as_matrix(tensor), as_matrix(tensor).T):
                bits = like.contiguous().numpy().tobytes()
                if any(
                    w.contiguous().numpy().tobytes() == bits
                    for w in windows(as_matrix(there), like)
                ):
                    found.append(f"{name} is in {key}")
    return found


@pytest.mark.parametrize("alpha", [None, 4], ids=["scaled", "of scale 1"])
@pytest.mark.parametrize("words", METHODS, ids="+".join)
def test_no_tensor_is_stored_twice(
    words: tuple[str, ...], alpha: float | None, tmp_path: Path, warnings_off: None
) -> None:
    adapter = trained(words, alpha)
    adapter.save(tmp_path)
    assert not twice(tmp_path)
    own = directory.read(tmp_path).lorakin_part
    assert own is not None
    for path, slots in (own.tensors or {}).items():
        wanted = adapter.tensors.saved_tensors(path)
        assert slots.keys() == wanted.keys()
        for slot, tensor in slots.items():
            assert tensor.dtype == wanted[slot].dtype
            assert tensor.numpy().tobytes() == wanted[slot].detach().numpy().tobytes()


@pytest.fixture
def warnings_off() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_delta_loras_anchor_is_a_range_of_peft_columns(tmp_path: Path) -> None:
    trained(("delta-lora",)).save(tmp_path)
    said = json.loads((tmp_path / "lorakin.json").read_text())["tensors"]
    slots = said["model.layers.0.self_attn.q_proj"]
    ranges = [where["columns"] for where in slots.values() if "columns" in where]
    assert ranges == [[4, 8, 1]]


def test_experts_are_columns_with_a_step(tmp_path: Path) -> None:
    model = tiny_mixtral()
    targets = r".*experts\.(gate_up_proj|down_proj)\.[0-2]"
    adapter = randomise(lk.adapt(model, lk.LoRA(rank=2, alpha=2), targets, seed=0))
    adapter.save(tmp_path)
    assert not (tmp_path / OURS).exists() and not twice(tmp_path)
    other = tiny_mixtral()
    loaded = lk.load(other, tmp_path)
    for path in adapter.placement.methods:
        for slot, tensor in adapter.tensors.saved_tensors(path).items():
            assert torch.equal(loaded.tensors.saved_tensors(path)[slot], tensor)


def test_a_narrower_adapter_is_a_range_of_a_wider_file(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    settings = lk.DeltaLoRA(rank=2, alpha=2, start_step=0)
    adapter = randomise(lk.adapt(model, settings, TARGETS, dtype=torch.bfloat16))
    directory.save(adapter, tmp_path)
    loaded = lk.load(tiny_llama(dtype=torch.bfloat16), tmp_path)
    path = "model.layers.0.self_attn.q_proj"
    for slot, tensor in adapter.tensors.saved_tensors(path).items():
        assert loaded.tensors.saved_tensors(path)[slot].dtype == torch.bfloat16
        assert torch.equal(loaded.tensors.saved_tensors(path)[slot], tensor)


KEY = "base_model.model.a.b.lora_A.weight"
PEFT = {KEY: torch.arange(24.0).view(4, 6)}


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (PEFT[KEY], {}),
        (PEFT[KEY][1:3], {"rows": [1, 3]}),
        (PEFT[KEY][:, 2:5], {"columns": [2, 5, 1]}),
        (PEFT[KEY][:, 1::3], {"columns": [1, 5, 3]}),
        (PEFT[KEY].flatten(), None),
        (PEFT[KEY].view(4, 2, 3), {"shape": [4, 2, 3]}),
        (PEFT[KEY][:2].bfloat16(), {"rows": [0, 2], "dtype": "bfloat16"}),
        (PEFT[KEY].double(), None),
        (-PEFT[KEY], None),
        (PEFT[KEY][0].clone(), {"rows": [0, 1], "shape": [6]}),
    ],
)
def test_a_range_is_found_and_read_back(tensor: Tensor, expected: dict[str, Any] | None) -> None:
    packing = Packing(PEFT, "base_model.model.")
    said = packing.packed({"a.b": {"A": tensor}}, "tensors")["a.b"]["A"]
    if expected is None:
        assert said == {"tensor": "tensors/a.b/A"}
    else:
        for name, value in {"tensor": KEY, "file": THEIRS, **expected}.items():
            assert json.loads(json.dumps(said))[name] == value
        assert not packing.tensors
    back = unpacked(json.loads(json.dumps(said)), packing.tensors, PEFT)
    assert back.dtype == tensor.dtype and torch.equal(back, tensor)


def test_a_zero_with_a_sign_is_another_number() -> None:
    packing = Packing({KEY: torch.zeros(2, 2)}, "base_model.model.")
    packing.packed({"a.b": {"A": -torch.zeros(2, 2)}}, "tensors")
    assert list(packing.tensors) == ["tensors/a.b/A"]


def test_one_object_stays_one() -> None:
    packing, rows = Packing(PEFT, "base_model.model."), PEFT[KEY][:2]
    said = packing.packed({"a.b": {"A": rows, "B": rows}}, "tensors")
    back = unpacked(json.loads(json.dumps(said)), {}, PEFT)["a.b"]
    assert back["A"] is back["B"]


@pytest.mark.parametrize(
    "change",
    [
        {"tensor": "nothing"},
        {"rows": [1, 5]},
        {"rows": [3, 1]},
        {"columns": [0, 7, 1]},
        {"columns": [0, 2, 0]},
        {"shape": [7]},
        {"shape": [2**40, 2**40]},
    ],
)
def test_a_range_that_is_not_there(change: dict[str, Any]) -> None:
    said = {"tensor": KEY, "file": THEIRS, **change}
    with pytest.raises(ValueError, match=r"."):
        unpacked(said, {}, PEFT)


@pytest.mark.parametrize(
    "change",
    [{"rows": [-1, 2]}, {"rows": [1]}, {"file": "other"}, {"dtype": "int8"}, {"strange": 1}],
)
def test_what_is_no_reference(change: dict[str, Any]) -> None:
    from lorakin.storage.schema import checked

    with pytest.raises(SchemaError):
        checked(TensorReference, {"tensor": KEY, **change})


def test_files_of_format_1_are_read(tmp_path: Path, edit_own: Callable[..., None]) -> None:
    adapter = trained(("delta-lora",))
    adapter.save(tmp_path)
    own = directory.read(tmp_path).lorakin_part
    assert own is not None and own.tensors is not None
    packing = Packing({}, "")
    tensors = packing.packed(own.tensors, "tensors")
    state = packing.packed(own.state, "state")
    (tmp_path / OURS).write_bytes(safetensors.torch.save(packing.tensors))
    edit_own(tmp_path, format=1, tensors=tensors, state=state)
    loaded = lk.load(tiny_llama(), tmp_path)
    for path in adapter.placement.methods:
        for slot, tensor in adapter.tensors.saved_tensors(path).items():
            assert torch.equal(loaded.tensors.saved_tensors(path)[slot], tensor)


@pytest.fixture
def edit_own() -> Callable[..., None]:
    from lorakin.storage.json_files import sha256
    from lorakin.storage.lorakin_part import checksum

    def edit(folder: Path, **changes: Any) -> None:
        said = json.loads((folder / "lorakin.json").read_text()) | changes
        names = [name for name in (THEIRS, OURS) if (folder / name).exists()]
        said["beside"] = {name: sha256((folder / name).read_bytes()) for name in names}
        said["sha256"] = checksum(said)
        (folder / "lorakin.json").write_text(json.dumps(said))

    return edit
