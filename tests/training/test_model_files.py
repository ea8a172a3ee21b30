"""Model directories that are damaged or lie: one sentence, before memory is taken, and nothing in
them is run.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakin as lk
import soak
from conftest import tiny_gpt2
from lorakin.training import loading, model_files, models

COUNT = soak.count("LORAKIN_FUZZ", 450) // 3
ABSURD = [
    10**12,
    10**9,
    10**6,
    2**63,
    0,
    -1,
    1.5,
    "x",
    None,
    [],
    {},
    [10**12],
    float("nan"),
    True,
    "../../etc/passwd",
    10**30,
]


@pytest.fixture
def folder(model_dir: str, tmp_path: Path) -> Path:
    shutil.copytree(model_dir, tmp_path / "model")
    return tmp_path / "model"


def say(folder: Path, name: str = "config.json", **values: Any) -> None:
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def sharded(folder: Path, suffix: str = "safetensors") -> dict[str, str]:
    """Split the weights into two files with an index, which is returned."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, where = "model" if suffix == "safetensors" else "pytorch_model", {}
    for number in (1, 2):
        part = {key: state[key] for key in sorted(state)[number - 1 :: 2]}
        name = f"{stem}-{number:05}-of-00002.{suffix}"
        save_file(
            part, folder / name, metadata={"format": "pt"}
        ) if suffix == "safetensors" else torch.save(part, folder / name)
        where |= dict.fromkeys(part, name)
    say(folder, index(suffix), metadata={"total_size": 1}, weight_map=where)
    return where


def index(suffix: str = "safetensors") -> str:
    return (
        "model.safetensors.index.json"
        if suffix == "safetensors"
        else "pytorch_model.bin.index.json"
    )


def refused(folder: Path, said: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(lk.ModelError, match=said) as caught:
        models.load_model(str(folder), "base")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_what_is_sound_loads(suffix: str, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    sharded(folder, suffix)
    stored = model_files.check(folder)
    assert stored.tensors == len(state) and stored.bytes > sum(t.nbytes for t in state.values())
    held = models.load_model(str(folder), "base").model.state_dict()
    assert all(torch.equal(tensor, held[key]) for key, tensor in state.items())


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "decoder_layers", "depths"])
def test_counts_of_things_that_python_makes(key: str, folder: Path) -> None:
    for value in (10**12, 10**9, [2, 10**12], 1e15):
        say(folder, **{key: value})
        refused(folder, f"{key} is 1e\\+.*more than any model has")
        for read in (models.config_of, models.load_tokenizer, models.stored_labels):
            with pytest.raises(lk.ModelError):
                read(str(folder))
    say(folder, **{key: 2}, text_config={key: 10**12})
    refused(folder, "more than any model has")


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**12},
        {"hidden_size": 10**9},
        {"intermediate_size": 10**10},
        {"num_hidden_layers": 90_000},
        {"head_dim": 10**9},
        {"num_key_value_heads": 10**9},
    ],
)
def test_sizes_are_compared_with_the_weights(changes: dict[str, int], folder: Path) -> None:
    say(folder, **changes)
    refused(folder, "asks for a model of .* or more, which .* in .* bytes, cannot hold")
    with pytest.raises(lk.ModelError):
        models.load_model(str(folder), labels=["a", "b"])


def test_generation_that_would_run_a_text_a_million_times(folder: Path) -> None:
    for name in ("generation_config.json", "config.json"):
        for key in ("num_beams", "num_return_sequences"):
            say(folder, name, **{key: 10**6})
            refused(folder, f"{name}: {key} is 1e\\+06, more than any model has")
            say(folder, name, **{key: 1})


def test_a_position_table_and_a_buffer_count_too(folder: Path, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(folder)
    say(folder, n_positions=10**12)
    refused(folder, "asks for a model of")

    class Buffers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.empty(10**6, 10**6, device="meta"))

    with (
        pytest.raises(lk.ModelError, match="1,000,000,000,000"),
        loading.limited_size(10, 10**9, "a file"),
    ):
        Buffers()
    Buffers()  # outside nothing is counted


def test_a_config_without_weights_is_bounded_as_well(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "TENSORS", 500)
    say(folder, num_hidden_layers=90_000)
    from lorakin.plan.meta_model import meta_model_of

    with pytest.raises(lk.ModelError, match="501"):
        meta_model_of(str(folder))


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    say(folder, intermediate_size=40)
    refused(
        folder,
        r"stores model.layers.0.mlp.down_proj.weight as \(32, 48\), and its config makes .* \(32, "
        r"40\)",
    )


@pytest.mark.parametrize(
    "where", ["../other.safetensors", "/etc/hostname", "a/b.safetensors", "..", ".hidden", "a\\b"]
)
def test_an_index_that_leads_outside(where: str, folder: Path) -> None:
    said = sharded(folder)
    say(folder, index(), weight_map=said | {next(iter(said)): where})
    refused(folder, "names a file outside")


def test_damaged_indexes(folder: Path) -> None:
    said = sharded(folder)
    first = next(iter(said))
    other = next(name for name in said.values() if name != said[first])
    for content, error in [
        (
            {"weight_map": said | {first: "model-00003-of-00003.safetensors"}},
            "not there: model-00003",
        ),
        ({"weight_map": said | {first: other}}, "says that .* is in .*, which does not hold it"),
        (
            {"weight_map": said | {"model.extra.weight": other}},
            "says that model.extra.weight is in",
        ),
        (
            {"weight_map": said | {first: "tokenizer.json"}},
            "expected files that end in .safetensors",
        ),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": [first]}, "no weight_map"),
        ({"weight_map": {first: 3}}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "holds list, expected an object"),
    ]:
        (folder / index()).write_text(json.dumps(content))
        refused(folder, error)
    twice = json.dumps({"weight_map": said})[:-2] + f', "{first}": "{other}"}}}}'
    for text, error in [
        ("{", "cannot be read as JSON"),
        ("[" * 50_000, "cannot be read as JSON"),
        (twice, "twice"),
    ]:
        (folder / index()).write_text(text)
        refused(folder, error)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    said = sharded(folder)
    key, name = next(iter(said.items()))
    other = next(file for file in said.values() if file != name)
    state = load_file(folder / other) | {key: torch.zeros(1)}
    save_file(state, folder / other, metadata={"format": "pt"})
    refused(folder, f"{key} stands in both")


def test_damaged_safetensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for change in (
        content[:-100],
        content[:40],
        b"",
        struct.pack("<Q", 2**62) + content[8:],
        content + b"0" * 64,
    ):
        file.write_bytes(change)
        refused(folder, "cannot be read.*cut off or damaged")
    file.unlink()
    refused(folder, "holds no weights")
    file.mkdir()
    refused(folder, "holds no weights")


class Attack:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (open, (str(self.file), "w"))


def deflated(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def test_bins_that_hold_no_state_dict_or_code(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    no_state = "something else than tensors by name"
    for content, error in [
        ([1, 2], no_state), (torch.ones(2), no_state),
        ({"model": state}, no_state), ({3: torch.ones(2)}, no_state),
        ("text", no_state), (None, no_state), (OrderedDict(state, more=3), no_state),
        (Attack(tmp_path / "ran"), "nothing in it is run"),
        (state | {"x": Attack(tmp_path / "ran")}, "nothing in it is run"),
    ]:  # fmt: skip
        torch.save(content, file)
        refused(folder, error)
    file.write_bytes(pickle.dumps(Attack(tmp_path / "ran")))
    refused(folder, "nothing in it is run|cannot be read")
    torch.save(state, file)
    whole = file.read_bytes()
    for change in (whole[:-3000], whole[:100], b"", b"junk" * 100):
        file.write_bytes(change)
        refused(folder, "cannot be read as weights|more than tensors, or is damaged")
    file.write_bytes(whole)
    deflated(file)
    refused(folder, "is compressed")
    torch.save({"x": torch.ones(1).expand(10**10)} | state, file)
    with pytest.warns(lk.errors.LorakinWarning):  # a view takes no memory
        models.load_model(str(folder), "base")
    old = io.BytesIO()
    torch.save(state, old, _use_new_zipfile_serialization=False)
    file.write_bytes(old.getvalue())
    models.load_model(str(folder), "base")
    file.write_bytes(old.getvalue()[: len(old.getvalue()) // 2])
    refused(folder, "cut off|cannot be read|cannot be loaded")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_settings_that_are_no_json(name: str, folder: Path) -> None:
    for text in ("", "{", "[" * 50_000, "[1]", '"x"', "\x00\x01", '{"a": 1' + "0" * 5000 + "}"):
        (folder / name).write_text(text)
        with pytest.raises(lk.ModelError) as caught:
            models.load_model(str(folder), "base")
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, "neither a file nor a directory|without a config.json")


def test_kernels_are_not_fetched(folder: Path) -> None:
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        say(folder, **{key: "someone/kernel"})
        refused(folder, f"{key} is 'someone/kernel', code from the hub")
        say(folder, **{key: None})
    models.load_model(str(folder), "base")


def test_a_distributed_checkpoint_is_not_read(folder: Path) -> None:
    shutil.copyfile(
        folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors"
    )
    refused(folder, "part of a distributed checkpoint")


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every holder of a value in JSON, with its key."""
    found = []
    pairs = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in pairs:
        found += [(content, key), *places(value)]
    return found


class Mutations:
    """Each changes one file of a directory."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder = folder
        self.chance = chance

    def file(self) -> Path:
        return self.chance.choice(sorted(self.folder.iterdir()))

    def flip(self) -> None:
        file = self.file()
        content = bytearray(file.read_bytes())
        for _ in range(self.chance.randint(1, 5)):
            content[self.chance.randrange(min(len(content), 3000))] = self.chance.randrange(256)
        file.write_bytes(content)

    def cut(self) -> None:
        file = self.file()
        os.truncate(file, self.chance.randrange(file.stat().st_size))

    def value(self) -> None:
        names = [file for file in sorted(self.folder.iterdir()) if file.suffix == ".json"]
        file = self.chance.choice([self.folder / "config.json", *names])
        content = json.loads(file.read_text())
        holder, key = self.chance.choice(places(content))
        holder[key] = self.chance.choice(ABSURD)
        file.write_text(json.dumps(content))

    def drop(self) -> None:
        file = self.chance.choice(
            [file for file in sorted(self.folder.iterdir()) if file.suffix == ".json"]
        )
        content = json.loads(file.read_text())
        holder, key = self.chance.choice(places(content))
        del holder[key]
        file.write_text(json.dumps(content))

    def remove(self) -> None:
        self.file().unlink()

    def directory(self) -> None:
        file = self.file()
        file.unlink()
        file.mkdir()


KINDS: list[str] = [name for name in vars(Mutations) if not name.startswith("_") and name != "file"]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_mutated_directories_end_in_one_sentence(
    suffix: str, model_dir: str, tmp_path: Path
) -> None:
    chance, whole = random.Random(23), tmp_path / "whole"
    shutil.copytree(model_dir, whole)
    sharded(whole, suffix)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    errors, loads = [], 0
    for number in range(COUNT):
        folder = tmp_path / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        kind = KINDS[number % len(KINDS)]
        getattr(Mutations(folder, chance), kind)()
        readers: list[Callable[..., Any]] = [
            models.config_of,
            models.load_tokenizer,
            models.load_model,
        ]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                readers[number % 2](str(folder))
                models.load_model(str(folder), "base", ["a", "b"] if number % 5 == 0 else None)
            loads += 1
        except lk.ModelError as error:
            errors.append(str(error))
        except BaseException as error:
            raise AssertionError(f"mutation {number}, {kind}, {suffix}") from error
    assert not [text for text in errors if "\n" in text or str(tmp_path) not in text]
    assert len(errors) > COUNT // 4 and loads > COUNT // 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # KiB
    soak.record(f"model directories mutated ({suffix})", tried=COUNT, refused=len(errors))


def test_a_config_that_asks_for_tuples_answers_by_name(folder: Path) -> None:
    say(folder, return_dict=False)
    loaded = models.load_model(str(folder))
    assert loaded.model(torch.tensor([[1, 2]])).logits.shape[:2] == (1, 2)


def test_weights_that_are_not_as_packed_as_the_config_says(folder: Path) -> None:
    say(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(lk.ModelError):
        models.load_model(str(folder))


def test_an_encoder_that_is_not_there(folder: Path) -> None:
    say(folder, is_encoder_decoder=True)
    with pytest.raises(lk.ModelError, match="is_encoder_decoder"):
        models.load_model(str(folder))


def test_a_sparse_tensor_in_a_pickle(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        {**state, "model.norm.weight": torch.eye(32).to_sparse()[0]}, folder / "pytorch_model.bin"
    )
    with pytest.raises(lk.ModelError, match=r"model\.norm\.weight"):
        models.load_model(str(folder))
