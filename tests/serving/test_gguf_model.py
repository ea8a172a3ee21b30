"""Whole models as GGUF files, against the gguf library, transformers' loading, and llama.cpp."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from lorakin.errors import (
    LorakinWarning,
    ModelError,
    OutputError,
    SettingError,
)
from lorakin.family import Pair
from lorakin.serving.gguf_adapter import write_adapter
from lorakin.serving.gguf_format import meta_model
from lorakin.serving.gguf_model import write_model
from serving.gguf_models import LLAMA3, MODELS, YARN, in_llama, llama, places, tiny


class TestModel:
    @pytest.mark.parametrize(
        "case", ["llama", "mistral", "qwen2", "qwen3"]
    )  # it reads no biases or rotations from the file
    def test_transformers_loads_it_with_equal_logits(
        self, case: str, words: Path, tmp_path: Path
    ) -> None:
        kind, changes = MODELS[case]
        model = tiny(kind, **changes)
        write_model(
            tmp_path / "m.gguf", model.config, words, model.state_dict(), dtype="f32", name="tiny"
        )
        names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors]
        assert ("output.weight" in names) is not model.config.tie_word_embeddings
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path,
            gguf_file="m.gguf",
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        torch.testing.assert_close(places(loaded), places(model), rtol=0, atol=1e-5)

    @llama
    @pytest.mark.peer
    @pytest.mark.parametrize("case", MODELS)
    def test_llama_cpp_gives_equal_logits(self, case: str, words: Path, tmp_path: Path) -> None:
        kind, changes = MODELS[case]
        model = tiny(kind, **changes)
        write_model(tmp_path / "m.gguf", model.config, words, model.state_dict(), dtype="f32")
        torch.testing.assert_close(in_llama(tmp_path / "m.gguf"), places(model), rtol=0, atol=2e-4)

    @llama
    @pytest.mark.peer
    @pytest.mark.parametrize(("dtype", "atol"), [("bf16", 0.3), ("f16", 0.05), ("q8_0", 0.5)])
    def test_smaller_dtypes_run_in_llama_cpp(
        self, dtype: str, atol: float, words: Path, tmp_path: Path
    ) -> None:
        model = tiny("qwen3", initializer_range=0.05)
        write_model(tmp_path / "m.gguf", model.config, words, model.state_dict(), dtype=dtype)
        torch.testing.assert_close(in_llama(tmp_path / "m.gguf"), places(model), rtol=0, atol=atol)

    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
    def test_numbers_are_the_nearest_of_the_dtype_and_vectors_stay_float32(
        self, dtype: str, words: Path, tmp_path: Path
    ) -> None:
        model = tiny("llama", intermediate_size=100, tie_word_embeddings=True)
        write_model(tmp_path / "m.gguf", model.config, words, model.state_dict(), dtype=dtype)
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        assert (
            tensors["blk.1.attn_norm.weight"].tensor_type.name
            == tensors["output_norm.weight"].tensor_type.name
            == "F32"
        )
        assert tensors["blk.1.ffn_up.weight"].tensor_type.name == dtype.upper()
        assert tensors["blk.1.ffn_down.weight"].tensor_type.name == (
            "F16" if dtype == "q8_0" else dtype.upper()
        )  # 100 / 32
        up = tensors["blk.1.ffn_up.weight"]
        stored = torch.tensor(gguf.quants.dequantize(up.data, up.tensor_type))
        weight = model.model.layers[1].mlp.up_proj.weight.detach()
        if dtype == "q8_0":
            step = weight.view(100, -1, 32).abs().amax(-1, keepdim=True) / 127
            assert (
                (stored - weight).view(100, -1, 32).abs() <= step * 0.57
            ).all()  # a half, and what a float16 step is off
        else:
            narrow = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
            assert torch.equal(stored, weight.to(narrow).float())

    def test_one_tensor_at_a_time_is_read(self, words: Path, tmp_path: Path) -> None:
        class Lazy(Mapping[str, Tensor]):
            def __init__(self, tensors: dict[str, Tensor]) -> None:
                self.tensors, self.asked = tensors, []

            def __getitem__(self, key: str) -> Tensor:
                self.asked.append(key)
                return self.tensors[key].clone()

            def __iter__(self) -> Iterator[str]:
                return iter(self.tensors)

            def __len__(self) -> int:
                return len(self.tensors)

            def __contains__(self, key: object) -> bool:
                return key in self.tensors

        model = tiny("llama")
        lazy = Lazy(model.state_dict())
        write_model(tmp_path / "lazy.gguf", model.config, words, lazy)
        write_model(tmp_path / "eager.gguf", model.config, words, model.state_dict())
        assert sorted(lazy.asked) == sorted(lazy.tensors)
        assert (tmp_path / "lazy.gguf").read_bytes() == (tmp_path / "eager.gguf").read_bytes()

    def test_a_tied_head_that_came_apart_is_written(self, words: Path, tmp_path: Path) -> None:
        model = tiny("llama", tie_word_embeddings=True)
        apart = {**model.state_dict(), "lm_head.weight": model.lm_head.weight + 1}
        write_model(tmp_path / "m.gguf", model.config, words, apart, dtype="f32")
        tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
        assert torch.equal(torch.tensor(tensors["output.weight"]), apart["lm_head.weight"])

    def test_the_context_ends_where_the_sliding_window_begins_to_matter(
        self, words: Path, tmp_path: Path
    ) -> None:
        model = tiny("mistral", sliding_window=48)
        with pytest.warns(LorakinWarning, match="48"):
            write_model(tmp_path / "m.gguf", model.config, words, model.state_dict())
        assert gguf.GGUFReader(tmp_path / "m.gguf").fields["llama.context_length"].contents() == 48

    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            ("gemma", {}, "gemma"),
            ("opt", {}, "'opt'"),
            ("llama", {"hidden_act": "gelu"}, "'gelu'"),
            (
                "llama",
                {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
                "'dynamic'",
            ),
            (
                "llama",
                {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
                "partial_rotary_factor|part",
            ),
            ("qwen2", {"rope_parameters": LLAMA3}, "qwen2"),
            ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.2}}, "attention_factor"),
            ("qwen3", {"attention_bias": True}, "attention_bias"),
        ],
    )
    def test_what_llama_cpp_would_compute_otherwise_is_refused(
        self, kind: str, changes: dict[str, Any], message: str, words: Path, tmp_path: Path
    ) -> None:
        config = transformers.AutoConfig.for_model(kind, **changes)
        with pytest.raises(ModelError, match=message):
            write_model(tmp_path / "m.gguf", config, words, {})
        assert not list(tmp_path.iterdir())

    def test_tensors_that_do_not_fit_are_refused_and_leave_the_file_that_was_there(
        self, words: Path, tmp_path: Path
    ) -> None:
        model, path = tiny("llama"), tmp_path / "m.gguf"
        path.write_text("before")
        state, key = model.state_dict(), "model.layers.1.mlp.up_proj.weight"
        large = {**state, key: torch.full((96, 64), 7e4)}
        cases = [
            ({k: v for k, v in state.items() if k != key}, "f32", key),
            (
                {**state, "score.weight": torch.ones(2, 64)},
                "f32",
                "score.weight",
            ),
            ({**state, key: torch.ones(96, 63)}, "f32", r"\(96, 63\)"),
            ({**state, key: torch.full((96, 64), math.nan)}, "f32", key),
            (large, "f16", f"{key}.*70000.*f16"),
            ({**state, key: torch.full((96, 64), 1e7)}, "q8_0", "q8_0"),
        ]
        for tensors, dtype, message in cases:
            with pytest.raises(ModelError, match=message):
                write_model(path, model.config, words, tensors, dtype=dtype)
        with pytest.raises(SettingError, match="'q4_0'"):
            write_model(path, model.config, words, state, dtype="q4_0")
        assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
        write_model(path, model.config, words, large, dtype="bf16")
        with pytest.raises(OutputError):
            write_model(words / "tokenizer.json" / "m.gguf", model.config, words, state)

    def test_a_disk_that_fills_up_leaves_the_file_that_was_there(
        self, words: Path, tmp_path: Path
    ) -> None:
        model, path = tiny("llama"), tmp_path / "m.gguf"
        path.write_text("before")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        try:
            with pytest.raises(OutputError):
                write_model(path, model.config, words, model.state_dict(), dtype="f32")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]

    def test_a_disk_that_fills_up_at_any_byte_of_an_adapter_is_named(self, tmp_path: Path) -> None:
        """NumPy's last write is lost without a word where it fails."""
        config, path = tiny("llama").config, tmp_path / "a.gguf"
        pairs = {"model.layers.0.mlp.up_proj": Pair(torch.ones(96, 3), torch.ones(3, 64))}
        write_adapter(path, config, pairs)
        size, limits = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
        path.write_text("before")
        try:
            for most in range(16, size, 16):
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
                with pytest.raises(OutputError, match=r"a\.gguf"):
                    write_adapter(path, config, pairs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]

    @pytest.mark.model
    def test_smollm2_is_written_as_the_package_has_it(self, tmp_path: Path) -> None:
        from lorakin.training import model_sources

        original = model_sources.packaged("smollm2")
        source = model_sources.directory_of("smollm2")
        config = transformers.AutoConfig.from_pretrained(source)
        config.num_hidden_layers = 2  # the first of 30
        every = load_file(source / "model.safetensors")
        weights = {key: every[key] for key in meta_model(config).state_dict() if key in every}
        path = tmp_path / "m.gguf"
        write_model(
            path, config, source, weights, dtype="f32", name="Smollm2 135M 8k Lc100K Mix1 Ep2"
        )
        theirs, ours = gguf.GGUFReader(original), gguf.GGUFReader(path)
        about = {
            "general.organization",
            "general.finetune",
            "general.basename",
            "general.size_label",
            "general.license",
        }
        about |= {"general.languages", "general.file_type", "GGUF.kv_count"}
        about |= {"GGUF.tensor_count", "llama.block_count"}
        for key in theirs.fields.keys() - about:
            assert ours.fields[key].contents() == theirs.fields[key].contents(), key
            assert ours.fields[key].types == theirs.fields[key].types, key
        there = {t.name: t for t in theirs.tensors}
        assert len(ours.tensors) == 2 + 2 * (len(there) - 2) // 30
        for mine in ours.tensors:
            tensor = there[mine.name]
            numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert (numbers == mine.data).all(), mine.name
