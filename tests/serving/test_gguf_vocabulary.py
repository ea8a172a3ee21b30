"""Tokenizers in GGUF files, against transformers' own loading, and llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import normalizers, pre_tokenizers, processors

from conftest import TEMPLATE
from lorakin.errors import (
    ModelError,
)
from lorakin.serving import gguf_vocabulary
from lorakin.serving.gguf_model import write_model
from lorakin.serving.gguf_vocabulary import read_vocabulary
from serving.gguf_models import tiny
from serving.words import CUTS, ROWS, WORDS, byte_tokenizer, piece_tokenizer


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
        ) in gguf_vocabulary.PRE_TOKENIZERS

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
