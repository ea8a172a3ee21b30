"""The tokenizer's part of a base's fingerprint: its vocabulary, tokenisation and chat template.

A tokenizer in which the same ids stand for other words is another base, as other weights are. Three
smaller differences only give a warning: more words at the vocabulary's end, another tokenisation of
the same text, and another chat template, which are often corrected upstream.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

TOKENIZER, WORDS, TOKENISATION, TEMPLATE, ALL = "tokenizer", "words", "cuts", "template", "all"
PROBE = (
    "The quick brown fox (no. 1,234) doesn't jump\n\tover 'naïve' café — 北京 ☃; "
    "x_y = f(a[0]) ** 2  # end"
)
"""Text that different tokenizers cut differently."""
PREFIX_SIZES = [2**power for power in range(4, 24)]
_of_models: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, tokenizer: Any) -> None:
    """Records the tokenizer of `model` for adapters that are saved from it or loaded into it."""
    template = getattr(tokenizer, "chat_template", None)
    words = {int(index): str(word) for word, index in tokenizer.get_vocab().items()}
    _of_models[model] = {
        WORDS: _digests_of_words(words),
        TOKENISATION: _digest(tokenizer(PROBE)["input_ids"]),
        TEMPLATE: _digest(template) if template else None,
    }


def fingerprint_of(model: nn.Module) -> dict[str, Any]:
    """Returns the tokenizer's part of a fingerprint; {} if none was loaded with the model."""
    return {TOKENIZER: _of_models[model]} if model in _of_models else {}


def is_other_vocabulary(remembered: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    """Returns whether an id stands for different words in the tokenizers of two fingerprints."""
    then, now = (base.get(TOKENIZER, {}).get(WORDS, {}) for base in (remembered, present))
    return any(
        digest != now[count] for count, digest in then.items() if count in now and count != ALL
    )


def differences(remembered: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Returns the smaller differences of the present base's tokenizer, in words before "than"."""
    then, now = remembered.get(TOKENIZER), present.get(TOKENIZER)
    if not then or not now:
        return []
    is_different = {
        "its tokenizer has other words at its end": then[WORDS].get(ALL) != now[WORDS].get(ALL),
        "its tokenizer cuts text otherwise": then[TOKENISATION] != now[TOKENISATION],
        "its chat template is another": then[TEMPLATE] != now[TEMPLATE],
    }
    return [what for what, differs in is_different.items() if differs]


def is_valid(base: Mapping[str, Any]) -> bool:
    """Returns whether the tokenizer's part of a fingerprint from a file has the right form."""
    part = base.get(TOKENIZER)
    if part is None:
        return True
    if not isinstance(part, dict) or not isinstance(words := part.get(WORDS), dict):
        return False
    digests = (*words.values(), part.get(TEMPLATE) or "")
    return isinstance(part.get(TOKENISATION), str) and all(isinstance(t, str) for t in digests)


def _digests_of_words(words: Mapping[int, str]) -> dict[str, str]:
    """Returns digests of the words with an id below 16, 32, 64 …, and of all."""
    running, digests, sizes = hashlib.sha256(), {}, iter(PREFIX_SIZES)
    size = next(sizes)
    for index, word in sorted(words.items()):
        while index >= size:
            digests[str(size)] = running.hexdigest()[:16]
            size = next(sizes, 2**63)
        running.update(f"{index} {word!a}\n".encode())
    return {**digests, ALL: running.hexdigest()[:16]}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
