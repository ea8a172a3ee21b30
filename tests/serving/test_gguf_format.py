"""GGUF files against their readers: the gguf library, transformers' own loading, and llama.cpp itself."""

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
from tokenizers import normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from conftest import TEMPLATE, tiny_gpt2, tiny_llama
from lorakin.errors import (
    AdapterError,
    LorakinError,
    LorakinWarning,
    ModelError,
    OutputError,
    SettingError,
)
from lorakin.family import Pair
from lorakin.inject.layers import EmbeddingLayer, kind_of
from lorakin.serving import gguf_vocabulary
from lorakin.serving.gguf_adapter import read_adapter, write_adapter
from lorakin.serving.gguf_format import ARCHITECTURES, skeleton
from lorakin.serving.gguf_model import write_model
from lorakin.serving.gguf_vocabulary import read_vocabulary
from peers import llama_cpp
from serving.words import CUTS, ROWS, WORDS, byte_tokenizer, piece_tokenizer

llama = pytest.mark.skipif(llama_cpp.available() is not None, reason=str(llama_cpp.available()))


def tiny(kind: str, **changes: Any) -> Any:
    """A random model of this kind with large weights, norms and biases, so that every mistake shows in the logits."""
    torch.manual_seed(3)
    settings = {
        "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**settings, **changes})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return model


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama with biases and wide heads": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": (
        "qwen3",
        {"head_dim": 128, "tie_word_embeddings": True},
    ),  # 128, as transformers takes for granted there
}


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    byte_tokenizer().save_pretrained(folder)
    return folder


def prompt() -> list[int]:
    return torch.randint(3, 290, (60,), generator=torch.Generator().manual_seed(7)).tolist()


def places(model: Any) -> Tensor:
    """Log-probabilities after each token of the prompt, (places, vocabulary)."""
    with torch.no_grad():
        return model(torch.tensor([prompt()])).logits[0].float().log_softmax(-1)


def in_llama(path: Path, *loras: Path) -> Tensor:
    """The same, as llama.cpp says."""
    (answer,) = llama_cpp.run(path, [prompt()], loras=loras, max_tokens=0, top=ROWS, score=True)
    return torch.tensor([[place[token] for token in range(ROWS)] for place in answer.prompt])


def random_pairs(model: Any, rank: int = 3, only: Any = lambda path: True) -> dict[str, Pair]:
    """A pair for each module with a matrix, of ranks that differ."""
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for number, (path, module) in enumerate(model.named_modules()):
        if (kind := kind_of(module)) and only(path):
            shape, k = kind.shape(module), rank + number % 2
            up, down = (
                torch.randn(shape.outputs, k, generator=generator),
                torch.randn(k, shape.inputs, generator=generator),
            )
            pairs[path] = Pair(up * 0.2, down * 0.1)
    return pairs


def apply_by_hand(model: Any, pairs: Mapping[str, Pair]) -> Any:
    """Add the pairs to the model's weights."""
    with torch.no_grad():
        for path, pair in pairs.items():
            module = model.get_submodule(path)
            change = pair.up @ pair.down
            module.weight += change if isinstance(module, nn.Linear) else change.T
    return model


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
        from lorakin.training import models as training_models

        original = training_models.packaged("smollm2")
        source = training_models.directory_of("smollm2")
        config = transformers.AutoConfig.from_pretrained(source)
        config.num_hidden_layers = 2  # the first of 30
        every = load_file(source / "model.safetensors")
        weights = {key: every[key] for key in skeleton(config).state_dict() if key in every}
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


class TestVocabulary:
    @pytest.mark.parametrize("name", CUTS)
    def test_the_way_of_cutting_is_found_in_the_tokenizer(self, name: str, tmp_path: Path) -> None:
        byte_tokenizer(CUTS[name]).save_pretrained(tmp_path)
        found = read_vocabulary(tmp_path, ROWS)
        assert (found.model, found.pre, found.space_prefix) == ("gpt2", name, False)

    def test_llama3_takes_words_unmerged(self, tmp_path: Path) -> None:
        tokenizer = byte_tokenizer(CUTS["smaug-bpe"])
        tokenizer.backend_tokenizer.model.ignore_merges = True
        tokenizer.save_pretrained(tmp_path)
        assert read_vocabulary(tmp_path, ROWS).pre == "llama-bpe"

    def test_qwen2s_own_tokenizer_is_known(self, tmp_path: Path) -> None:
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

        assert (
            (("Split", PRETOKENIZE_REGEX), ("ByteLevel", False)),
            False,
        ) in gguf_vocabulary.KNOWN

    def test_every_token_keeps_its_number_kind_and_the_merges_their_order(
        self, words: Path
    ) -> None:
        tokenizer, found = byte_tokenizer(), read_vocabulary(words, ROWS)
        size = len(tokenizer)
        assert list(found.tokens[:size]) == tokenizer.convert_ids_to_tokens(range(size))
        assert found.tokens[size:] == [f"[PAD{n}]" for n in range(size, ROWS)] and set(
            found.types[size:]
        ) == {5}
        assert [found.types[n] for n in (0, 1, 2, size - 1)] == [3, 3, 1, 4]
        assert len(found.merges) == 300 - 256 - 2 and found.merges[0] in {"t h", "Ġ t", "h e"}
        assert found.special == {"eos": 0, "pad": 0, "eot": 0} and found.template == TEMPLATE
        assert not found.add_bos and not found.add_eos

    @pytest.mark.parametrize("prefix", [True, False])
    def test_sentencepiece_has_scores_in_the_order_of_its_merges(
        self, prefix: bool, tmp_path: Path
    ) -> None:
        tokenizer = piece_tokenizer(prefix)
        tokenizer.save_pretrained(tmp_path)
        found = read_vocabulary(tmp_path, ROWS + 20)
        assert (found.model, found.pre, found.space_prefix, found.add_bos, found.add_eos) == (
            "llama",
            "default",
            prefix,
            True,
            False,
        )
        assert (
            found.types[:4] == [2, 3, 3, 6]
            and found.types.count(6) == 256
            and found.tokens[3] == "<0x00>"
        )
        ranks = {
            t: found.scores[n]
            for t, n in tokenizer.get_vocab().items()
            if found.types[n] == 1 and len(t) > 1
        }
        assert sorted(ranks.values(), reverse=True) == [-float(n) for n in range(len(ranks))]
        assert all(
            found.scores[n] < min(ranks.values())
            for t, n in tokenizer.get_vocab().items()
            if len(t) == 1
        )

    def test_transformers_reads_the_same_sentencepiece_back(self, tmp_path: Path) -> None:
        tokenizer, model = piece_tokenizer(), tiny("llama", vocab_size=ROWS + 20)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        write_model(tmp_path / "m.gguf", model.config, tmp_path / "tokenizer", model.state_dict())
        back = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        for text in ["the lazy fox", "don't you 1234", "naïve ☃ café"]:
            assert back.encode(text, add_special_tokens=False) == tokenizer.encode(
                text, add_special_tokens=False
            ), text

    @pytest.mark.parametrize(
        "kind", ["cut", "normalizer", "wordlevel", "around", "rows", "pieces", "bytes"]
    )
    def test_a_tokenizer_without_a_form_there_is_refused(
        self, kind: str, tmp_path: Path, tokenizer: Any
    ) -> None:
        made, rows = byte_tokenizer(), ROWS
        inner = made.backend_tokenizer
        if kind == "cut":
            inner.pre_tokenizer, message = (
                pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), WORDS]),
                "Punctuation",
            )
        elif kind == "normalizer":
            inner.normalizer, message = normalizers.Lowercase(), "Lowercase"
        elif kind == "wordlevel":
            made, message = tokenizer, "WordLevel"
        elif kind == "around":
            single = processors.TemplateProcessing(
                single="<|user|> $A", special_tokens=[("<|user|>", 1)]
            )
            inner.post_processor, message = single, "'a'"
        elif kind == "rows":
            rows, message = 280, "280"
        elif kind == "pieces":
            made, message = piece_tokenizer(), "NFKC"
            made.backend_tokenizer.normalizer = normalizers.NFKC()
        else:
            made, message = byte_tokenizer(), "256"
            made.backend_tokenizer.model.byte_fallback = True
            made.backend_tokenizer.pre_tokenizer = None
            made.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
        made.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=message):
            read_vocabulary(tmp_path, rows)

    def test_a_directory_without_a_tokenizer_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError):
            read_vocabulary(tmp_path, ROWS)


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
            "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0
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
        model = skeleton(config)
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


def write_raw(
    path: Path,
    tensors: Mapping[str, Tensor],
    alpha: float | None = None,
    arch: str = "qwen2",
    kind: str = "lora",
    invocation: list[int] | None = None,
    quantised: bool = False,
) -> None:
    """An adapter file by the gguf library alone."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    if invocation:
        writer.add_array("adapter.alora.invocation_tokens", invocation)
    for name, tensor in tensors.items():
        if quantised:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
