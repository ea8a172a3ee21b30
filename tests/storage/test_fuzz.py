"""Damaged and hostile adapter directories: an error and an untouched model, or a whole adapter.

A fixed number of mutations of real directories, drawn from one seed.
`LORAKIN_FUZZ=10000 pytest tests/storage/test_fuzz.py` tries more.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import random
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import lorakin as lk
import soak
from conftest import randomise, tiny_llama, tiny_mixtral
from lorakin.storage import directory
from lorakin.storage.summary import summarise

COUNT = soak.count("LORAKIN_FUZZ", 400)
MEMBERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "patterns": (
        lk.LoRA(4, 8, rslora=True),
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "dora": (lk.DoRA(rank=2), {"targets": ["q_proj", "down_proj"]}),
    "vera": (lk.VeRA(rank=4), {"targets": ["q_proj", "down_proj"]}),
    "adalora": (lk.AdaLoRA(initial_rank=3, target_rank=2), {"targets": ["q_proj", "v_proj"]}),
    "delta-lora": (lk.DeltaLoRA(rank=2, start_step=1), {"targets": ["q_proj", "v_proj"]}),
    "whole": (lk.LoRA(2), {"targets": "q_proj", "modules_to_save": ["lm_head"]}),
    "experts": (
        lk.LoRA(4),
        {"targets": ["q_proj", "gate_up_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
    ),
    "some experts": (
        lk.DoRA(rank=2),
        {"targets": ["gate_up_proj.1", "down_proj.0", "down_proj.2"]},
    ),
}
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "(",
    "(.*",
    "../../../etc/passwd",
    "\x00",
    [],
    [None],
    ["x", 3],
    {},
    {"a": "b"},
    {"(": 1},
    float("nan"),
    "LORA",
    "all-linear",
    ["q_proj", "q_proj"],
    [[[]]],
    "💥" * 50,
]


def base_for(word: str) -> Any:
    """A fresh base for the adapter of this kind."""
    return tiny_mixtral() if "experts" in word else tiny_llama(tied=False)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved adapter of each kind."""
    saved = {}
    ids = torch.arange(3, 12).view(1, -1)
    for word, (member, more) in MEMBERS.items():
        model = base_for(word)
        adapter = lk.adapt(model, member, seed=1, **more)
        optimizer = adapter.optimizer(torch.optim.SGD, lr=0.1, total_steps=3)
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if word not in ("adalora", "delta-lora"):
            randomise(adapter)
        saved[word] = adapter.save(tmp_path_factory.mktemp(word))
    return saved


class Mutations:
    """Each changes a directory in one way.

    Those in `MUST_FAIL` leave nothing that could be loaded whole.
    """

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder = folder
        self.chance = chance
        self.tensors = folder / "adapter_model.safetensors"

    def file(self) -> Path:
        return self.chance.choice(sorted(self.folder.iterdir()))

    def flip_bytes(self) -> None:
        file = self.file()
        content = bytearray(file.read_bytes())
        for _ in range(self.chance.randint(1, 8)):
            content[self.chance.randrange(len(content))] = self.chance.randrange(256)
        file.write_bytes(content)

    def flip_header(self) -> None:
        content = bytearray(self.tensors.read_bytes())
        length = struct.unpack("<Q", content[:8])[0]
        for _ in range(self.chance.randint(1, 4)):
            content[self.chance.randrange(8 + length)] = self.chance.randrange(256)
        self.tensors.write_bytes(content)

    def header_length(self) -> None:
        content = self.tensors.read_bytes()
        length = self.chance.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(content), 10**8])
        self.tensors.write_bytes(struct.pack("<Q", length) + content[8:])

    def truncate(self) -> None:
        content = self.tensors.read_bytes()
        self.tensors.write_bytes(content[: self.chance.randrange(len(content))])

    def grow(self) -> None:
        self.tensors.write_bytes(self.tensors.read_bytes() + os.urandom(16))

    def junk_value(self) -> None:
        file = self.folder / self.chance.choice(["adapter_config.json", "lorakin.json"])
        content = json.loads(file.read_text())
        holder, key = self.chance.choice(list(places(content)))
        holder[key] = self.chance.choice(JUNK)
        file.write_text(json.dumps(content))

    def drop_value(self) -> None:
        file = self.folder / self.chance.choice(["adapter_config.json", "lorakin.json"])
        content = json.loads(file.read_text())
        holder, key = self.chance.choice(list(places(content)))
        del holder[key]
        file.write_text(json.dumps(content))

    def json_text(self) -> None:
        file = self.folder / self.chance.choice(["adapter_config.json", "lorakin.json"])
        file.write_text(
            self.chance.choice(
                [
                    "",
                    "[" * 100_000,
                    "null",
                    "[]",
                    '"x"',
                    "{",
                    '{"peft_type": "LORA"',
                    "\ufeff{}",
                    "{'a': 1}",
                ]
            )
        )

    def duplicate_json_key(self) -> None:
        file = self.folder / "adapter_config.json"
        file.write_text(
            '{"lora_alpha": 1, ' + file.read_text().replace("{", '"lora_alpha": 2, ', 1).lstrip()
        )

    def rewritten(self, change: Callable[[dict[str, Tensor], str], None]) -> None:
        tensors = safetensors.torch.load_file(self.tensors)
        change(tensors, self.chance.choice(sorted(tensors)))
        safetensors.torch.save_file(
            {k: t.contiguous() for k, t in tensors.items()}, self.tensors, metadata={"format": "pt"}
        )

    def drop_tensor(self) -> None:
        self.rewritten(lambda tensors, key: tensors.__delitem__(key))

    def extra_tensor(self) -> None:
        names = [
            "x",
            "../../x",
            "base_model.model.lm_head.lora_A.weight",
            "base_model.model..lora_A.weight",
            "lora_A.weight",
        ]
        self.rewritten(
            lambda tensors, key: tensors.update({self.chance.choice(names): torch.ones(2, 2)})
        )

    def rename_tensor(self) -> None:
        self.rewritten(
            lambda tensors, key: tensors.update(
                {key.replace("proj", "prjo") + "x": tensors.pop(key)}
            )
        )

    def reshape_tensor(self) -> None:
        self.rewritten(
            lambda tensors, key: tensors.update({key: torch.ones(*tensors[key].shape, 3)})
        )

    def grow_rank(self) -> None:
        self.rewritten(
            lambda tensors, key: tensors.update({key: torch.cat([tensors[key], tensors[key]])})
        )

    def empty_tensor(self) -> None:
        self.rewritten(lambda tensors, key: tensors.update({key: tensors[key][:0]}))

    def integer_tensor(self) -> None:
        self.rewritten(lambda tensors, key: tensors.update({key: tensors[key].to(torch.int64)}))

    def not_finite(self) -> None:
        bad = self.chance.choice([float("nan"), float("inf"), float("-inf")])
        self.rewritten(
            lambda tensors, key: tensors.update(
                {key: tensors[key].index_fill(0, torch.tensor(0), bad)}
            )
        )

    def pickle_instead(self) -> None:
        self.tensors.unlink()
        (self.folder / "adapter_model.bin").write_bytes(
            pickle.dumps(Executed(str(self.folder / "executed")))
        )


MUST_FAIL = (
    "header_length",
    "truncate",
    "grow",
    "duplicate_json_key",
    "drop_tensor",
    "extra_tensor",
    "rename_tensor",
    "reshape_tensor",
    "integer_tensor",
    "not_finite",
    "pickle_instead",
)
MUTATIONS = [
    name
    for name in vars(Mutations)
    if not name.startswith("_") and name not in ("file", "rewritten")
]


class Executed:
    """What a hostile pickle does when it is run."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def places(content: Any) -> Any:
    """Every (holder, key) in nested JSON."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from places(content[key])


def test_mutations(sources: dict[str, Path], tmp_path: Path) -> None:
    chance = random.Random(4)
    models = {"experts" in word: base_for(word) for word in sources}
    ids = torch.arange(3, 12).view(1, -1)
    untouched = {which: copy.deepcopy(model) for which, model in models.items()}
    tried = dict.fromkeys(MUTATIONS, 0)
    refused = dict.fromkeys(MUTATIONS, 0)
    for number in range(COUNT):
        word, kind = chance.choice(sorted(sources)), MUTATIONS[number % len(MUTATIONS)]
        model, before = (there["experts" in word] for there in (models, untouched))
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sources[word], folder)
        getattr(Mutations(folder, chance), kind)()
        tried[kind] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", lk.LorakinWarning)
                adapter = lk.load(model, folder, trainable=bool(number % 2))
        except lk.LorakinError:
            refused[kind] += 1
        else:
            # `beside` binds our tensors to PEFT's: if those were changed, PEFT's files count
            assert kind not in MUST_FAIL, f"{kind} of {word} (number {number}) was loaded"
            with torch.no_grad():
                largest = max(float(p.abs().max()) for p in adapter.parameters() if p.numel())
                assert model(ids).logits.isfinite().all() or largest > 1e15, (kind, word, number)
            if number % 2:  # go on training it, from where it says that it was
                with contextlib.suppress(lk.LorakinError), warnings.catch_warnings():
                    warnings.simplefilter("ignore", lk.LorakinWarning)
                    adapter.restore(folder)
                    adapter.optimizer(torch.optim.SGD, lr=0.1, total_steps=3)
            adapter.remove()
        assert not lk.adapters(model) and not (folder / "executed").exists()
        assert all(map(torch.equal, model.parameters(), before.parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lk.LorakinWarning)
            with contextlib.suppress(lk.LorakinError):
                summarise(folder)
    with torch.no_grad():
        assert all(
            torch.equal(models[which](ids).logits, untouched[which](ids).logits) for which in models
        )
    assert all(count == refused[kind] for kind, count in tried.items() if kind in MUST_FAIL)
    assert all(count >= COUNT // len(MUTATIONS) for count in tried.values())
    soak.record(
        "Hostile files",
        files="adapter directories",
        tried=COUNT,
        refused=sum(refused.values()),
        usable=COUNT - sum(refused.values()),
        code_run=0,
    )


def test_the_directories_load_as_they_are(sources: dict[str, Path]) -> None:
    for word, folder in sources.items():
        lk.load(base_for(word), folder)


def test_a_file_outside_the_directory_is_never_opened(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(sources["delta-lora"], folder)
    own = json.loads((folder / "lorakin.json").read_text())
    own["beside"] = {"../../secret": own["beside"]["adapter_model.safetensors"]}
    (folder / "lorakin.json").write_text(json.dumps(own))
    with pytest.raises(lk.AdapterError, match=r"\.\./\.\./secret"):
        directory.read(folder)


def test_a_named_adapter_of_peft_is_pointed_to(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["dora"], tmp_path / "out" / "french")
    with pytest.raises(lk.AdapterError, match=r"french.*load one of"):
        lk.load(tiny_llama(tied=False), tmp_path / "out")


ENDLESS = [
    "(([a-z._0-9]*)*)*!",
    "(a|a)*b",
    "(?:.|..)*!",
    "(.?){50}.{50}!",
    "(?:(?:(?:.{1,9}){1,9}){1,9}){1,9}!",
    ".*" * 12 + "!",
    "(?:.*a){40}!",
    "(?=(.+)+!).*",
    "(?!(.|.)*!)(?:.*)*!",
    "(.*)*(.*)*(.*)*!",
    "(.?){1000000000}!",
    "(?:.{1000}){1000}!",
]
REFUSED = [
    "(.*)\\1",
    "(a)?(?(1)b|c)",
    "(?>.*)x",
    ".*+x",
    "(",
    "[",
    "*",
    "(?P<x>",
    "x{2,1}",
    "(" * 5000 + ")" * 5000,
    "x|" * 60_000,
]


@pytest.mark.parametrize("pattern", [*ENDLESS, *REFUSED], ids=lambda pattern: pattern[:12])
def test_a_pattern_that_would_never_end_ends(
    pattern: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Those that can be matched step by step match nothing here; the others are refused."""
    folder, model = tmp_path / "adapter", tiny_llama(tied=False)
    shutil.copytree(sources["patterns"], folder)
    (folder / "lorakin.json").unlink()
    whole = json.loads((folder / "adapter_config.json").read_text())
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        own = {**whole.get(field, {}), pattern: 2} if field.endswith("pattern") else pattern
        (folder / "adapter_config.json").write_text(json.dumps(whole | {field: own}))
        begun = time.monotonic()
        refused = pattern in REFUSED or field == "target_modules"
        with pytest.raises(lk.AdapterError) if refused else contextlib.nullcontext():
            lk.load(model, folder)
        for adapter in list(lk.adapters(model).values()):
            adapter.remove()
        assert time.monotonic() - begun < 5


def test_many_patterns(sources: dict[str, Path], tmp_path: Path) -> None:
    folder, model = tmp_path / "adapter", tiny_llama(tied=False)
    shutil.copytree(sources["patterns"], folder)
    (folder / "lorakin.json").unlink()
    whole = json.loads((folder / "adapter_config.json").read_text())
    begun = time.monotonic()
    for keys in ([f"a{n}" for n in range(100_000)], [f".*a{n}" for n in range(100_000)]):
        many = dict.fromkeys(keys, 2)
        for change in (
            {"rank_pattern": many},
            {"alpha_pattern": many},
            {"target_modules": keys},
            {"modules_to_save": keys},
        ):
            (folder / "adapter_config.json").write_text(json.dumps(whole | change))
            with pytest.raises(lk.AdapterError):
                lk.load(model, folder)
    as_many_as_modules = {f"^model\\.layers\\.{n}\\.mlp\\.up_proj": 2 for n in range(10, 50_000)}
    (folder / "adapter_config.json").write_text(
        json.dumps(whole | {"rank_pattern": whole["rank_pattern"] | as_many_as_modules})
    )
    lk.load(model, folder)
    assert time.monotonic() - begun < 60
