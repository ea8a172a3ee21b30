"""Small tokenizers of the kinds that llama.cpp knows."""

from __future__ import annotations

import json
from typing import Any

import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from conftest import TEMPLATE

ROWS = 320  # of the embedding: some more than there are tokens
CORPUS = ["the quick brown fox jumps over the lazy dog"] * 4 + [
    "it's 1234 of 56 things, don't you think? naïve café\n\n  ok"
] * 4
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {
    "gpt-2": WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT % ""), "isolated"), BYTES]),
    "smaug-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT % "{1,3}"), "isolated"), BYTES]
    ),
}


def byte_tokenizer(cut: Any = WORDS, **more: Any) -> Any:
    """A byte-level BPE tokenizer with specials and one added word."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = cut, decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|end|>", "<|user|>"]
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=specials),
    )
    raw.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    settings = {"eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": TEMPLATE, **more}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **settings)


def piece_tokenizer(prefix: bool = True) -> Any:
    """A SentencePiece-like tokenizer, as Llama 2's."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=60))
    part = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in part["merges"]]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    tokens += [a + b for a, b in merges] + [token for token in part["vocab"] if len(token) == 1]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    raw = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    raw.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
