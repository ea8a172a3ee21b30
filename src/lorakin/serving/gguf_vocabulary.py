"""A transformers tokenizer in llama.cpp's form.

Two kinds have a form there. One is byte-level BPE, GPT-2's, with one of several ways of cutting
text into words first, which llama.cpp knows by name. The other is SentencePiece's BPE, Llama 2's,
which merges in the order of scores instead of by a list of merges. Everything is read from the
tokenizer as transformers runs it, so a file says what the model was trained with.

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
KNOWN: dict[tuple[Steps, bool], str] = {
    ((_WORDS,), False): "gpt-2",
    ((("Digits", True), _WORDS), False): "smollm",
    ((("Split", _LETTERS + r"\p{N}" + _REST), _BYTES), False): "qwen2",
    ((("Split", _LETTERS + r"\p{N}{1,3}" + _REST), _BYTES), True): "llama-bpe",
    ((("Split", _LETTERS + r"\p{N}{1,3}" + _REST), _BYTES), False): "smaug-bpe",
    ((("Split", _TEKKEN), _BYTES), True): "tekken",
}
"""llama.cpp's `tokenizer.ggml.pre`, by the steps that cut the text and by whether a word that is in
the vocabulary is taken unmerged.
"""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

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
        """Puts it into the GGUFWriter's metadata."""
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
        directory: where the tokenizer is.
        size: rows of the embedding; ids without a token become unused ones.
        template: another chat template than the tokenizer's own.

    Raises:
        ModelError: there is no tokenizer, it has more tokens than `size`, or llama.cpp has no form
            for it.
    """
    with loading.as_model_error(f"{directory} has no tokenizer that can be loaded"):
        tokenizer = loading.tokenizer(directory, local_files_only=True)
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
    tokenizer.chat_template = template or tokenizer.chat_template
    model, where = parts["model"], f"{directory}: the tokenizer"
    unlike = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(key) for key in unlike):
        raise ModelError(
            f"{where} is of the kind {model['type']}; llama.cpp's form is written for plain BPE "
            "only"
        )
    if max(tokenizer.get_vocab().values()) >= size:
        raise ModelError(
            f"{where} has the token {max(tokenizer.get_vocab().values())}, the model's embedding "
            f"only {size} rows"
        )

    pieces = bool(model.get("byte_fallback"))
    tokens, types = _tokens(tokenizer, parts, size)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    before, after = _around(tokenizer, where)
    written = tokenizer.chat_template
    if isinstance(written, dict):
        written = [{"name": name, "template": text} for name, text in written.items()]
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre="default" if pieces else _pre(parts, where),
        tokens=tokens,
        types=types,
        merges=[] if pieces else [" ".join(part.replace(" ", "Ġ") for part in p) for p in merges],
        scores=_scores(tokens, types, merges, where) if pieces else [],
        special=_special(tokenizer),
        add_bos=before,
        add_eos=after,
        space_prefix=pieces and _space_prefix(parts, where),
        template=written,
    )


def _tokens(tokenizer: Any, parts: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Returns the `size` tokens in the order of their ids, and llama.cpp's type of each."""
    model, added = parts["model"], {token["id"]: token for token in parts["added_tokens"]}
    pieces = bool(model.get("byte_fallback"))
    tokens, types = [f"[PAD{n}]" for n in range(size)], [gguf.TokenType.UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
        if number in added and added[number]["special"]:
            types[number] = gguf.TokenType.CONTROL
        elif number in added:
            tokens[number], types[number] = token.replace(_SPACE, " "), gguf.TokenType.USER_DEFINED
        if pieces and token == model.get("unk_token"):
            types[number] = gguf.TokenType.UNKNOWN
        elif pieces and number not in added and _BYTE.fullmatch(token):
            types[number] = gguf.TokenType.BYTE
    return tokens, types


def _special(tokenizer: Any) -> dict[str, int]:
    """Returns the ids of special tokens by llama.cpp's words; an answer ends at "eot" too."""
    known = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    known["eot"] = next(iter(end_of_turn(tokenizer)), None)
    return {kind: number for kind, number in known.items() if number is not None}


def _around(tokenizer: Any, where: str) -> tuple[bool, bool]:
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
    """Returns llama.cpp's name for how a byte-level tokenizer cuts text into words.

    llama.cpp does not normalise text for it; NFC is let pass.

    Raises:
        ModelError: it normalises text otherwise, or cuts it in a way that has no name there.
    """
    normalizer = parts["normalizer"]
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise ModelError(
            f"{where} normalises text by {normalizer['type']}, which llama.cpp does not for "
            "byte-level BPE"
        )
    steps, unmerged = _steps(parts["pre_tokenizer"]), bool(parts["model"].get("ignore_merges"))
    if (steps, unmerged) not in KNOWN:
        raise ModelError(
            f"{where} cuts text in a way that is not known here under a name of llama.cpp's "
            f"(ignore_merges: {unmerged}): "
            f"{json.dumps(parts['pre_tokenizer'], ensure_ascii=False)}. Known are: "
            f"{', '.join(KNOWN.values())}. Use llama.cpp's convert_hf_to_gguf.py"
        )
    return KNOWN[steps, unmerged]


def _space_prefix(parts: dict[str, Any], where: str) -> bool:
    """Returns whether a SentencePiece tokenizer puts a space before the text.

    Raises:
        ModelError: it prepares text in another way than by writing spaces as ▁.
    """
    normalizer, cutter = parts["normalizer"], parts["pre_tokenizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if cutter is None and steps in ([replace], [prepend, replace]):
        return len(steps) == 2
    is_metaspace = not steps and cutter and cutter["type"] == "Metaspace"
    if is_metaspace and cutter["replacement"] == _SPACE and not cutter["split"]:
        return bool(cutter["prepend_scheme"] != "never")
    prepares = json.dumps([normalizer, cutter], ensure_ascii=False)
    raise ModelError(f"{where} prepares text as llama.cpp does not for SentencePiece: {prepares}")


def _scores(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]], where: str
) -> list[float]:
    """Returns how early each token is merged: 0 for the first, −1 for the next, and so on.

    Raises:
        ModelError: a byte is missing, which llama.cpp needs for characters that are no tokens.
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
