"""GGUF files that are cut off, mutated or lie: one sentence before any library reads them, and
before memory is taken.
"""

from __future__ import annotations

import os
import random
import resource
import struct
import warnings
from pathlib import Path

import gguf
import pytest
import torch

import lorakin as lk
import soak
from lorakin.serving.gguf_adapter import read_adapter, write_adapter
from lorakin.serving.gguf_model import write_model
from lorakin.training import gguf_cache, gguf_header, models
from serving.gguf_models import tiny
from serving.words import byte_tokenizer

COUNT = soak.count("LORAKIN_FUZZ", 180)
ABSURD = [0, 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**64 - 1, 10**9, 255]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A tiny real model."""
    folder = tmp_path_factory.mktemp("gguf")
    byte_tokenizer().save_pretrained(folder)
    model = tiny("llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    write_model(folder / "m.gguf", model.config, folder, model.state_dict(), dtype="f32")
    return (folder / "m.gguf").read_bytes()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


def string(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", 8) + text(value)


def uint(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def tensor(name: str, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def written(
    path: Path,
    keys: list[bytes],
    tensors: list[bytes],
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] = (-1, -1),
) -> Path:
    """A file with these entries, and bytes for three tensors of 32 numbers."""
    count = [
        given if given >= 0 else len(made)
        for given, made in zip(counts, (tensors, keys), strict=True)
    ]
    head = magic + struct.pack("<IQQ", version, *count) + b"".join(keys) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(3 * 128))
    return path


ARCH, LAYERS = string("general.architecture", "llama"), uint("llama.block_count", 1)
GOOD = [tensor("blk.0.a"), tensor("blk.0.b", offset=128)]


def test_a_sound_header_is_read(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole)
    header = gguf_header.check_model(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {t.name: tuple(t.shape.tolist()) for t in reader.tensors} == header.tensors
    assert header.count("token_embd.weight") == 320 * 32
    assert {key for key in reader.fields if not key.startswith("GGUF.")} == header.values.keys()
    assert header.values["llama.block_count"] == 1
    assert header.values["tokenizer.ggml.tokens"] == gguf_header.Array(8, 320)
    assert gguf_header.check_model(
        written(tmp_path / "x.gguf", [ARCH, LAYERS], GOOD)
    ).tensors.keys() == {"blk.0.a", "blk.0.b"}


@pytest.mark.parametrize(
    ("said", "keys", "tensors", "more"),
    [
        ("GGUF", [ARCH, LAYERS], GOOD, {"magic": b"GGML"}),
        ("version", [ARCH, LAYERS], GOOD, {"version": 7}),
        ("50331648", [ARCH, LAYERS], GOOD, {"version": 3 << 24}),  # of the other byte order
        ("1,152,921,504,606,846,976", [ARCH, LAYERS], GOOD, {"counts": (2**60, -1)}),
        ("1,152,921,504,606,846,976", [ARCH, LAYERS], GOOD, {"counts": (-1, 2**60)}),
        ("bytes", [struct.pack("<Q", 2**60)], GOOD, {}),
        ("3,000", [ARCH, LAYERS, text("a") + struct.pack("<IQ", 8, 3000)], [], {}),
        ("middle", [text("a") + struct.pack("<IIQ", 9, 4, 2**60)], GOOD, {}),
        ("elements", [text("a") + struct.pack("<IIQ", 9, 8, 2**60)], GOOD, {}),
        ("type 9", [text("a") + struct.pack("<IIQIQ", 9, 9, 1, 4, 0)], GOOD, {}),
        ("type 77", [text("a") + struct.pack("<I", 77)], GOOD, {}),
        ("UTF-8", [struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1)], GOOD, {}),
        (r"general\.architecture", [ARCH, ARCH], GOOD, {}),
        (r"blk\.0\.a", [ARCH, LAYERS], [tensor("blk.0.a"), tensor("blk.0.a", offset=128)], {}),
        (r"blk\.0\.b", [ARCH, LAYERS], [tensor("blk.0.a"), tensor("blk.0.b", offset=96)], {}),
        ("ends", [ARCH, LAYERS], [tensor("blk.0.a", offset=2**40)], {}),
        ("ends", [ARCH, LAYERS], [tensor("blk.0.a", (2**40, 2**20))], {}),
        ("alignment", [ARCH, LAYERS], [tensor("blk.0.a", offset=8)], {}),
        ("type 99", [ARCH, LAYERS], [tensor("blk.0.a", kind=99)], {}),
        ("divide", [ARCH, LAYERS], [tensor("blk.0.a", (31,), kind=2)], {}),
        ("divide", [ARCH, LAYERS], [tensor("blk.0.a", (0,))], {}),
        ("dimensions", [ARCH, LAYERS], [tensor("blk.0.a", ())], {}),
        ("dimensions", [ARCH, LAYERS], [tensor("blk.0.a", (1, 1, 1, 1, 1))], {}),
        (r"general\.alignment", [ARCH, LAYERS, uint("general.alignment", 0)], GOOD, {}),
        (r"general\.alignment", [ARCH, LAYERS, uint("general.alignment", 24)], GOOD, {}),
        (r"general\.alignment", [ARCH, LAYERS, string("general.alignment", "x")], GOOD, {}),
        (r"general\.architecture", [LAYERS], GOOD, {}),
        (r"general\.architecture", [uint("general.architecture", 7), LAYERS], GOOD, {}),
        (r"llama\.block_count", [ARCH], GOOD, {}),
        (r"llama\.block_count", [ARCH, uint("llama.block_count", 10**6)], GOOD, {}),
        (r"llama\.block_count", [ARCH, string("llama.block_count", "x")], GOOD, {}),
        (r"blk\.1", [ARCH, LAYERS], [*GOOD, tensor("blk.1.a", offset=256)], {}),
        ("LoRA", [ARCH, LAYERS, string("general.type", "adapter")], GOOD, {}),
        ("parts", [ARCH, LAYERS, uint("split.count", 3)], GOOD, {}),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused_before_the_library_reads_it(
    said: str,
    keys: list[bytes],
    tensors: list[bytes],
    more: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = written(tmp_path / "m.gguf", keys, tensors, **more)  # type: ignore[arg-type]
    monkeypatch.setattr(gguf, "GGUFReader", None)
    for read in (models.load_model, models.config_of, models.load_tokenizer):
        with pytest.raises(lk.ModelError, match=said):
            read(str(path))


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "empty.gguf").touch()
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("folder", "pipe", "missing"):
        with pytest.raises(lk.ModelError):
            models.load_model(str(tmp_path / f"{name}.gguf"))
        with pytest.raises(lk.ModelError):
            gguf_header.read_header(tmp_path / f"{name}.gguf")
    with pytest.raises(lk.ModelError):
        models.load_model(str(tmp_path / "empty.gguf"))


def test_a_model_without_some_of_its_weights_is_not_converted(
    whole: bytes, tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_zz.weight"))
    with pytest.raises(
        lk.ModelError, match="blk.0.ffn_zz.weight|lacks model.layers.0.mlp.up_proj.weight"
    ):
        models.load_model(str(path))
    assert not list(cache.glob("m-*"))


def test_tensors_that_are_left_out_are_said(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    model = tiny(
        "llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1, attention_bias=True
    )
    write_model(tmp_path / "m.gguf", model.config, tmp_path, model.state_dict(), dtype="f32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = tiny("llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        write_model(
            tmp_path / "plain.gguf", plain.config, tmp_path, plain.state_dict(), dtype="f32"
        )
        gguf_cache._read(tmp_path / "plain.gguf")
    with pytest.warns(lk.errors.LorakinWarning, match="LlamaForCausalLM"):
        gguf_cache._read(tmp_path / "m.gguf")


class Mutations:
    """Each changes the bytes of a file in one way."""

    def __init__(self, content: bytes, chance: random.Random) -> None:
        self.content = bytearray(content)
        self.chance = chance
        self.header = content.index(b"ffn_norm")  # most of what is before it is the vocabulary

    def flip_bytes(self) -> None:
        for _ in range(self.chance.randint(1, 6)):
            self.content[self.chance.randrange(len(self.content))] = self.chance.randrange(256)

    def flip_keys(self) -> None:
        for _ in range(self.chance.randint(1, 3)):
            self.content[self.chance.randrange(900)] = self.chance.randrange(256)

    def flip_tensors(self) -> None:
        for _ in range(self.chance.randint(1, 3)):
            at = self.header + self.chance.randrange(-300, 300)
            self.content[at] = self.chance.randrange(256)

    def truncate(self) -> None:
        del self.content[self.chance.randrange(len(self.content)) :]

    def absurd(self) -> None:
        at = self.chance.choice(
            [8, 16, self.chance.randrange(24, 900), self.header + self.chance.randrange(-300, 300)]
        )
        self.content[at : at + 8] = struct.pack("<Q", self.chance.choice(ABSURD))

    def count(self) -> None:
        keys = [
            b"block_count",
            b"head_count",
            b"embedding_length",
            b"feed_forward_length",
            b"vocab_size",
            b"dimension_count",
            b"context_length",
            b"eos_token_id",
            b"file_type",
            b"key_length",
            b"head_count_kv",
        ]
        key = self.chance.choice(keys)
        if (at := self.content.find(key)) >= 0:
            at += len(key)
            self.content[at + 4 : at + 8] = struct.pack(
                "<I", self.chance.choice(ABSURD) & 0xFFFFFFFF
            )

    def kind(self) -> None:
        at = self.content.find(
            self.chance.choice(
                [b"block_count", b"head_count", b"rope.freq_base", b"ggml.model", b"ggml.pre"]
            )
        )
        at = self.content.find(b"\x00\x00\x00", at)
        self.content[at - 1 : at] = bytes([self.chance.randrange(14)])

    def rename(self) -> None:
        words = [
            b"general.architecture",
            b"llama.block_count",
            b"tokenizer.ggml.tokens",
            b"tokenizer.ggml.merges",
            b"llama",
            b"gpt2",
            b"output_norm",
            b"token_embd",
            b"attn_q",
            b"tokenizer.ggml.token_type",
            b"f32",
        ]
        word = self.chance.choice(words)
        self.content = self.content.replace(word, bytes(reversed(word)))

    def swap(self) -> None:
        a, b = sorted(self.chance.sample(range(len(self.content) // 16), 2))
        span = self.chance.randint(1, 64)
        self.content[a : a + span], self.content[b : b + span] = (
            self.content[b : b + span],
            self.content[a : a + span],
        )


KINDS = [name for name in vars(Mutations) if not name.startswith("_")]


def test_mutated_files_end_in_one_sentence(whole: bytes, tmp_path: Path) -> None:
    chance, path = random.Random(17), tmp_path / "m.gguf"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused: list[tuple[int, str, str]] = []
    for number in range(COUNT):
        mutations = Mutations(whole, chance)
        kind = KINDS[number % len(KINDS)]
        getattr(mutations, kind)()
        path.write_bytes(mutations.content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if number % 3 == 0:
                    models.config_of(str(path))
                gguf_cache._read(path)
        except lk.ModelError as error:
            refused.append((number, kind, str(error)))
        except BaseException as error:
            raise AssertionError(f"mutation {number}, {kind}") from error
    assert not [one for one in refused if str(path) not in one[2] or "\n" in one[2]]
    assert COUNT // 3 < len(refused) < COUNT - COUNT // 10
    soak.record("GGUF files mutated", tried=COUNT, refused=len(refused))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # KiB


def test_mutated_adapters_end_in_one_sentence(tmp_path: Path) -> None:
    chance, path = random.Random(18), tmp_path / "a.gguf"
    config = tiny("llama", num_hidden_layers=1).config
    pair = lk.family.Pair(torch.randn(64, 2), torch.randn(2, 64))
    write_adapter(path, config, {"model.layers.0.self_attn.q_proj": pair})
    content, refused = path.read_bytes(), []
    for number in range(COUNT):
        changed = bytearray(content)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(400)
            changed[at : at + 1] = bytes([chance.randrange(256)])
        if number % 4 == 0:
            del changed[chance.randrange(len(changed)) :]
        if number % 4 == 1:
            changed[(at := chance.randrange(8, 400)) : at + 8] = struct.pack(
                "<Q", chance.choice(ABSURD)
            )
        path.write_bytes(changed)
        try:
            read_adapter(path, config)
        except lk.AdapterError as error:
            refused.append(str(error))
    assert len(refused) > COUNT // 2 and all(str(path) in text for text in refused)
