"""LoRA adapters as GGUF files, against the gguf library and llama.cpp."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers

from conftest import tiny_gpt2, tiny_llama
from lorakin.errors import (
    AdapterError,
    LorakinError,
    ModelError,
    SettingError,
)
from lorakin.family import Pair
from lorakin.inject.layer_kinds import EmbeddingLayer, kind_of
from lorakin.serving.gguf_adapter import read_adapter, write_adapter
from lorakin.serving.gguf_format import ARCHITECTURES, meta_model
from lorakin.serving.gguf_model import write_model
from serving.gguf_models import (
    apply_by_hand,
    in_llama,
    llama,
    places,
    random_pairs,
    tiny,
    write_raw,
)
from serving.words import ROWS


class TestAdapter:
    @pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
    def test_what_is_written_is_read_back(self, dtype: str, tmp_path: Path) -> None:
        model = tiny("llama")
        narrow = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
        pairs = {
            path: Pair(*(t.to(narrow) for t in pair[:2]))
            for path, pair in random_pairs(model).items()
        }
        write_adapter(tmp_path / "a.gguf", model.config, pairs, dtype=dtype)
        back = read_adapter(tmp_path / "a.gguf", model.config)
        assert back.keys() == pairs.keys()
        for path, pair in pairs.items():
            k = pair.up.shape[1]
            assert back[path].up.dtype == torch.float32 and back[path].up.shape[1] == 4
            assert torch.equal(back[path].up[:, :k], pair.up.float()) and torch.equal(
                back[path].down[:k], pair.down.float()
            )
            assert not back[path].up[:, k:].any() and not back[path].down[k:].any()

    def test_the_file_is_what_llama_cpps_converter_makes_of_it(self, tmp_path: Path) -> None:
        model = tiny("llama")
        pairs = random_pairs(
            model, only=lambda path: "layers.1" in path or path == "model.embed_tokens"
        )
        write_adapter(tmp_path / "a.gguf", model.config, pairs)
        reader = gguf.GGUFReader(tmp_path / "a.gguf")
        fields = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("GGUF")
        }
        assert fields == {
            "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
            "adapter.lora.alpha": 4.0
        }  # fmt: skip
        tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
        assert len(tensors) == 16
        assert tensors["token_embd.weight.lora_a"].shape == (ROWS, 4) and tensors[
            "token_embd.weight.lora_b"
        ].shape == (64, 4)
        assert tensors["blk.1.ffn_down.weight.lora_a"].shape == (4, 96)
        for module, name, heads in (
            ("q_proj", "attn_q", 4),
            ("k_proj", "attn_k", 2),
            ("v_proj", "attn_v", 0),
        ):
            up = pairs[f"model.layers.1.self_attn.{module}"].up
            if heads:  # the formula of llama.cpp's converter
                up = (
                    up.reshape(heads, 2, len(up) // heads // 2, -1).swapaxes(1, 2).reshape(up.shape)
                )
            assert torch.equal(tensors[f"blk.1.{name}.weight.lora_b"][:, : up.shape[1]], up)

    @llama
    @pytest.mark.peer
    @pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
    def test_llama_cpp_gives_the_logits_of_the_changed_weights(
        self, kind: str, words: Path, tmp_path: Path
    ) -> None:
        model = tiny(kind)
        write_model(tmp_path / "m.gguf", model.config, words, model.state_dict(), dtype="f32")
        pairs = random_pairs(model)  # with embedding and head
        write_adapter(tmp_path / "a.gguf", model.config, pairs)
        base = places(model)
        changed = places(apply_by_hand(model, pairs))
        assert (changed - base).abs().max() > 1
        torch.testing.assert_close(
            in_llama(tmp_path / "m.gguf", tmp_path / "a.gguf"), changed, rtol=0, atol=5e-4
        )

    @pytest.mark.parametrize("kind", ARCHITECTURES)
    def test_every_linear_layer_of_every_architecture_has_a_name(
        self, kind: str, tmp_path: Path
    ) -> None:
        small = {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 40,
        }
        extra = (
            {"layer_types": ["full_attention"] * 2}
            if kind in ("cohere2", "gemma2", "gemma3_text")
            else {}
        )
        ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
        config = transformers.AutoConfig.for_model(
            kind, **small, **ids, **extra, intermediate_size=64, head_dim=16
        )
        model = meta_model(config)
        linears = {
            path: Pair(torch.ones(shape.outputs, 1), torch.ones(1, shape.inputs))
            for path, module in model.named_modules()
            if (layer := kind_of(module)) and layer is not EmbeddingLayer and path != "lm_head"
            for shape in [layer.shape(module)]
        }
        assert len(linears) >= 8
        write_adapter(tmp_path / "a.gguf", config, linears)
        assert read_adapter(tmp_path / "a.gguf", config).keys() == linears.keys()

    def test_alpha_over_rank_is_part_of_what_is_read_and_zero_means_one(
        self, tmp_path: Path
    ) -> None:
        model, path = tiny("qwen2"), tmp_path / "a.gguf"
        for alpha, factor in ((16.0, 4.0), (0.0, 1.0), (None, 1.0)):
            write_raw(
                path,
                {
                    "blk.0.ffn_up.weight.lora_a": torch.ones(4, 64),
                    "blk.0.ffn_up.weight.lora_b": torch.ones(96, 4),
                },
                alpha,
            )
            pair = read_adapter(path, model.config)["model.layers.0.mlp.up_proj"]
            assert torch.equal(pair.up, torch.full((96, 4), factor)) and torch.equal(
                pair.down, torch.ones(4, 64)
            )

    def test_q8_0_adapters_of_llama_cpps_converter_are_read(self, tmp_path: Path) -> None:
        a, b = torch.randn(32, 64), torch.randn(96, 32)
        write_raw(
            tmp_path / "a.gguf",
            {"blk.0.ffn_up.weight.lora_a": a, "blk.0.ffn_up.weight.lora_b": b},
            32.0,
            quantised=True,
        )
        pair = read_adapter(tmp_path / "a.gguf", tiny("qwen2").config)["model.layers.0.mlp.up_proj"]
        torch.testing.assert_close(pair.down, a, rtol=0, atol=0.02)
        torch.testing.assert_close(pair.up, b, rtol=0, atol=0.02)

    def test_modules_that_llama_cpp_cannot_adapt_are_refused_before_anything_is_written(
        self, tmp_path: Path
    ) -> None:
        path, config = tmp_path / "a.gguf", tiny_llama(tied=True).config
        gpt2 = tiny_gpt2().config
        embedding = Pair(torch.ones(32, 1), torch.ones(1, 64))
        fine = Pair(torch.ones(48, 1), torch.ones(1, 32))
        place = "model.layers.0.mlp.up_proj"
        cases: list[tuple[Any, dict[str, Pair], str]] = [
            (config, {"model.embed_tokens": embedding}, "model.embed_tokens"),
            (
                config,
                {"lm_head": Pair(torch.ones(64, 1), torch.ones(1, 32))},
                "lm_head",
            ),
            (gpt2, {"transformer.wpe": embedding}, "transformer.wpe"),
            (config, {place: fine, "score": fine}, "score"),
            (config, {"model.layers.2.mlp.up_proj": fine}, "model.layers.2.mlp.up_proj"),
            (
                config,
                {place: Pair(fine.down.T, fine.up.T)},
                r"\(32, 1\).*\(1, 48\).*48 × 32",
            ),
            (
                config,
                {place: Pair(fine.up * math.inf, fine.down)},
                place,
            ),
            (config, {}, ""),
        ]
        for base, pairs, message in cases:
            with pytest.raises(AdapterError, match=message):
                write_adapter(path, base, pairs)
        with pytest.raises(AdapterError, match=f"{place}.*70000.*f16"):
            write_adapter(path, config, {place: Pair(fine.up * 7e4, fine.down)}, dtype="f16")
        with pytest.raises(ValueError, match=place):
            write_adapter(path, config, {place: Pair(fine.up, fine.down, torch.ones(48))})
        with pytest.raises(ModelError, match="bloom"):
            write_adapter(path, transformers.BloomConfig(), {place: fine})
        with pytest.raises(SettingError, match="'q8_0'"):
            write_adapter(path, config, {place: fine}, dtype="q8_0")
        assert not list(tmp_path.iterdir())

    def test_files_that_are_no_adapter_of_the_model_are_refused(
        self, words: Path, tmp_path: Path
    ) -> None:
        model, path = tiny("qwen2"), tmp_path / "a.gguf"
        a, b = (
            {"blk.0.ffn_up.weight.lora_a": torch.ones(4, 64)},
            {"blk.0.ffn_up.weight.lora_b": torch.ones(96, 4)},
        )
        other = {
            "blk.9.ffn_up.weight.lora_a": torch.ones(4, 64),
            "blk.9.ffn_up.weight.lora_b": torch.ones(96, 4),
        }
        cases = [
            (a, {}, "lora_b"),
            (b, {}, "lora_a"),
            ({}, {}, "a.gguf"),
            (other, {}, "blk.9.ffn_up.weight"),
            (
                {**a, **b, "blk.0.attn_norm.weight": torch.ones(64)},
                {},
                "blk.0.attn_norm.weight",
            ),
            (
                {**a, "blk.0.ffn_up.weight.lora_b": torch.ones(96, 3)},
                {},
                "96 × 64",
            ),
            ({**a, "blk.0.ffn_up.weight.lora_b": torch.ones(96)}, {}, "blk.0.ffn_up"),
            (
                {**a, "blk.0.ffn_up.weight.lora_b": torch.full((96, 4), math.nan)},
                {},
                "blk.0.ffn_up",
            ),
            ({**a, **b}, {"arch": "llama"}, "'llama'.*'qwen2'"),
            ({**a, **b}, {"kind": "dreambooth"}, "'dreambooth'"),
            ({**a, **b}, {"alpha": math.nan}, "nan"),
            ({**a, **b}, {"invocation": [1, 2]}, "aLoRA"),
        ]
        for tensors, metadata, message in cases:
            write_raw(path, tensors, **{"alpha": 4.0, **metadata})
            with pytest.raises(AdapterError, match=message):
                read_adapter(path, model.config)
        write_model(path, model.config, words, model.state_dict())
        with pytest.raises(AdapterError, match="general.type"):
            read_adapter(path, model.config)
        with pytest.raises(AdapterError, match="none.gguf"):
            read_adapter(tmp_path / "none.gguf", model.config)

    def test_a_damaged_file_is_an_error_of_ours_wherever_it_is_damaged(
        self, tmp_path: Path
    ) -> None:
        model, path = tiny("qwen2", num_hidden_layers=1), tmp_path / "a.gguf"
        write_adapter(
            path,
            model.config,
            random_pairs(model, rank=1, only=lambda path: path.endswith("_proj")),
        )
        whole = path.read_bytes()
        header = whole.index(b"blk.0.ffn_down") + 200
        generator = torch.Generator().manual_seed(0)
        damaged = [
            whole[:length] for length in (*range(0, header, 7), len(whole) // 2, len(whole) - 1)
        ]
        for at in range(0, header, 3):
            value = int(torch.randint(256, (), generator=generator))
            damaged.append(whole[:at] + bytes([value]) + whole[at + 1 :])
        refused = 0
        for content in damaged:
            path.write_bytes(content)
            try:
                read_adapter(path, model.config)
            except AdapterError:
                refused += 1
            except LorakinError as error:  # pragma: no cover - says which
                raise AssertionError(f"{type(error)} for a damaged file") from error
        assert refused > len(damaged) * 0.8
