"""A transformers tokenizer in llama.cpp's form.

llama.cpp has forms for two kinds. One is byte-level BPE, GPT-2's, with one of several ways to split
text into words first, which llama.cpp knows by name. The other is SentencePiece's BPE, Llama 2's,
which merges in the order of scores instead of by a list of merges. Everything is read from the
tokenizer as transformers runs it, so a file holds the tokenizer that the model was trained with.

The gguf library's own readers give other types and scores: see docs/project/dependencies.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from lorakin.errors import ModelError
from lorakin.training import loading
from lorakin.training.endings import end_of_turn

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES, _WORDS = ("ByteLevel", False), ("ByteLevel", True)
_SPACE = "▁"
_BYTE = re.compile("<0x.{2}>", re.DOTALL)

Steps = tuple[tuple[Any, ...], ...]
PRE_TOKENIZERS: dict[tuple[Steps, bool], str] = {
    ((_WORDS,), False): "gpt-2",
    ((("Digits", True), _WORDS), False): "smollm",
    ((("Split", _LETTERS + r"\p{N}" + _REST), _BYTES), False): "qwen2",
    ((("Split", _LETTERS + r"\p{N}{1,3}" + _REST), _BYTES), True): "llama-bpe",
    ((("Split", _LETTERS + r"\p{N}{1,3}" + _REST), _BYTES), False): "smaug-bpe",
    ((("Split", _TEKKEN), _BYTES), True): "tekken",
}
"""llama.cpp's `tokenizer.ggml.pre`, by the steps that split the text and by whether a word in the
vocabulary is one token whatever the merges (ignore_merges)."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF file holds it.

    `merges` belong to byte-level BPE ("gpt2"), `scores` to SentencePiece ("llama").
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    template: Any

    def add_to(self, writer: Any) -> None:
        """Adds the vocabulary to the GGUFWriter's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for kind, number in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.space_prefix)
        if self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(directory: Path, size: int, template: str | None = None) -> Vocabulary:
    """Reads the tokenizer saved in `directory`, for a model with `size` rows in its embedding.

    Args:
        directory: the tokenizer's directory.
        size: the rows of the embedding; ids without a token become unused ones.
        template: another chat template than the tokenizer's.

    Raises:
        ModelError: there is no tokenizer, it has more tokens than `size`, or llama.cpp has no form
            for it.
    """
    with loading.as_model_error(f"{directory} has no tokenizer that can be loaded"):
        tokenizer = loading.tokenizer(directory, local_files_only=True)
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
    tokenizer.chat_template = template or tokenizer.chat_template
    model, where = parts["model"], f"{directory}: the tokenizer"
    unsupported = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(key) for key in unsupported):
        raise ModelError(
            f"{where} is of type {model['type']}; lorakin can write only plain BPE in llama.cpp's "
            "form"
        )
    if max(tokenizer.get_vocab().values()) >= size:
        raise ModelError(
            f"{where} has the token {max(tokenizer.get_vocab().values())}, the model's embedding "
            f"only {size} rows"
        )

    is_sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _tokens(tokenizer, parts, size)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    add_bos, add_eos = _adds_bos_eos(tokenizer, where)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        templates = [{"name": name, "template": text} for name, text in templates.items()]
    merge_lines = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges]
    return Vocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        pre="default" if is_sentencepiece else _pre(parts, where),
        tokens=tokens,
        types=types,
        merges=[] if is_sentencepiece else merge_lines,
        scores=_scores(tokens, types, merges, where) if is_sentencepiece else [],
        special=_special(tokenizer),
        add_bos=add_bos,
        add_eos=add_eos,
        space_prefix=is_sentencepiece and _space_prefix(parts, where),
        template=templates,
    )


def _tokens(tokenizer: Any, parts: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Returns the `size` tokens in the order of their ids, and llama.cpp's type of each."""
    model, added = parts["model"], {token["id"]: token for token in parts["added_tokens"]}
    is_sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = [f"[PAD{n}]" for n in range(size)], [gguf.TokenType.UNUSED] * size
    for token, index in tokenizer.get_vocab().items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
        if index in added and added[index]["special"]:
            types[index] = gguf.TokenType.CONTROL
        elif index in added:
            tokens[index], types[index] = token.replace(_SPACE, " "), gguf.TokenType.USER_DEFINED
        if is_sentencepiece and token == model.get("unk_token"):
            types[index] = gguf.TokenType.UNKNOWN
        elif is_sentencepiece and index not in added and _BYTE.fullmatch(token):
            types[index] = gguf.TokenType.BYTE
    return tokens, types


def _special(tokenizer: Any) -> dict[str, int]:
    """Returns the ids of special tokens by llama.cpp's names; an answer ends at "eot" too."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    ids["eot"] = next(iter(end_of_turn(tokenizer)), None)
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def _adds_bos_eos(tokenizer: Any, where: str) -> tuple[bool, bool]:
    """Returns whether the tokenizer puts BOS before a text, and EOS after it.

    Raises:
        ModelError: it puts anything else there.
    """
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for before in ([], [tokenizer.bos_token_id]):
        for after in ([], [tokenizer.eos_token_id]):
            if full == before + plain + after:
                return bool(before), bool(after)
    raise ModelError(
        f"{where} turns 'a' into {full}, which is not {plain} with BOS before or EOS after it, as "
        "llama.cpp can"
    )


def _steps(part: dict[str, Any] | None) -> Steps:
    """Returns a pre_tokenizer of tokenizer.json in a form to compare: its steps, in order."""
    if part is None:
        return ()
    kind = part["type"]
    if kind == "Sequence":
        return tuple(step for inner in part["pretokenizers"] for step in _steps(inner))
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return (("ByteLevel", part.get("use_regex", True)),)
    if kind == "Digits":
        return (("Digits", part["individual_digits"]),)
    isolates = kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]
    if isolates and "Regex" in part["pattern"]:
        return (("Split", part["pattern"]["Regex"]),)
    return ((kind, json.dumps(part, sort_keys=True, ensure_ascii=False)),)


def _pre(parts: dict[str, Any], where: str) -> str:
    """Returns llama.cpp's name for how a byte-level tokenizer splits text into words.

    llama.cpp does not normalise text for it; a tokenizer that normalises by NFC is accepted all the
    same.

    Raises:
        ModelError: it normalises text otherwise, or llama.cpp has no name for how it splits text.
    """
    normalizer = parts["normalizer"]
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise ModelError(
            f"{where} normalises text by {normalizer['type']}, which llama.cpp does not for "
            "byte-level BPE"
        )
    steps, unmerged = _steps(parts["pre_tokenizer"]), bool(parts["model"].get("ignore_merges"))
    if (steps, unmerged) not in PRE_TOKENIZERS:
        raise ModelError(
            f"{where} splits text in a way for which lorakin knows no name of llama.cpp's "
            f"(ignore_merges: {unmerged}): "
            f"{json.dumps(parts['pre_tokenizer'], ensure_ascii=False)}. It knows "
            f"{', '.join(PRE_TOKENIZERS.values())}. Use llama.cpp's convert_hf_to_gguf.py"
        )
    return PRE_TOKENIZERS[steps, unmerged]


def _space_prefix(parts: dict[str, Any], where: str) -> bool:
    """Returns whether a SentencePiece tokenizer puts a space before the text.

    Raises:
        ModelError: it prepares text in another way than by writing spaces as ▁.
    """
    normalizer, pre_tokenizer = parts["normalizer"], parts["pre_tokenizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if pre_tokenizer is None and steps in ([replace], [prepend, replace]):
        return len(steps) == 2
    is_metaspace = not steps and pre_tokenizer and pre_tokenizer["type"] == "Metaspace"
    if is_metaspace and pre_tokenizer["replacement"] == _SPACE and not pre_tokenizer["split"]:
        return bool(pre_tokenizer["prepend_scheme"] != "never")
    prepares = json.dumps([normalizer, pre_tokenizer], ensure_ascii=False)
    raise ModelError(f"{where} prepares text as llama.cpp does not for SentencePiece: {prepares}")


def _scores(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]], where: str
) -> list[float]:
    """Returns how early each token is merged: 0 for the first, −1 for the next, and so on.

    Raises:
        ModelError: a byte is missing, which llama.cpp needs for characters without a token.
    """
    if sum(kind == gguf.TokenType.BYTE for kind in types) != 256:
        raise ModelError(
            f"{where} falls back on bytes without having all 256 of them as tokens <0x00> to <0xFF>"
        )
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    last = len(order)
    return [
        -float(order.get(t, last)) if kind == gguf.TokenType.NORMAL else 0.0
        for t, kind in zip(tokens, types, strict=True)
    ]
