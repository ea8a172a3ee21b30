"""What an adapter remembers of the tokenizer and chat template that its base was loaded with.

A tokenizer in which other words have the same numbers is another base, as other weights are. One
with more words behind the others, one that cuts text otherwise, or a template that puts other words
around a prompt, shifts what the adapter sees without making it another's, and templates are mended
upstream all the time: that is said, and no more.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

TOKENIZER, WORDS, CUTS, TEMPLATE, ALL = "tokenizer", "words", "cuts", "template", "all"
PROBE = (
    "The quick brown fox (no. 1,234) doesn't jump\n\tover 'naïve' café — 北京 ☃; "
    "x_y = f(a[0]) ** 2  # end"
)
"""Text that different tokenizers cut differently."""
PREFIXES = [2**power for power in range(4, 24)]
_known: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, tokenizer: Any) -> None:
    """Let adapters that are saved from `model`, or loaded into it, know its tokenizer."""
    template = getattr(tokenizer, "chat_template", None)
    _known[model] = {
        WORDS: _words({int(number): str(word) for word, number in tokenizer.get_vocab().items()}),
        CUTS: _digest(tokenizer(PROBE)["input_ids"]),
        TEMPLATE: _digest(template) if template else None,
    }


def known(model: nn.Module) -> dict[str, Any]:
    """The tokenizer's part of a fingerprint; {} if none was loaded with the model."""
    return {TOKENIZER: said} if (said := _known.get(model)) is not None else {}


def is_other_vocabulary(remembered: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether a number stands for different words in the tokenizers of two fingerprints."""
    then, now = (base.get(TOKENIZER, {}).get(WORDS, {}) for base in (remembered, here))
    return any(
        digest != now[count] for count, digest in then.items() if count in now and count != ALL
    )


def differences(remembered: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What else is another in the tokenizer of the base `here`, in words."""
    then, now = remembered.get(TOKENIZER), here.get(TOKENIZER)
    if not then or not now:
        return []
    said = {
        "its tokenizer has other words at its end": then[WORDS].get(ALL) != now[WORDS].get(ALL),
        "its tokenizer cuts text otherwise": then[CUTS] != now[CUTS],
        "its chat template is another": then[TEMPLATE] != now[TEMPLATE],
    }
    return [what for what, is_so in said.items() if is_so]


def are_texts(base: Mapping[str, Any]) -> bool:
    """Whether a fingerprint from a file says of the tokenizer what `remember` could have said."""
    said = base.get(TOKENIZER)
    if said is None:
        return True
    if not isinstance(said, dict) or not isinstance(words := said.get(WORDS), dict):
        return False
    template = said.get(TEMPLATE)
    return isinstance(said.get(CUTS), str) and all(
        isinstance(text, str) for text in (*words.values(), template or "")
    )


def _words(words: Mapping[int, str]) -> dict[str, str]:
    """Digests of the words with a number below 16, 32, 64 …, and of all."""
    running, made, waiting = hashlib.sha256(), {}, iter(PREFIXES)
    end = next(waiting)
    for number, word in sorted(words.items()):
        while number >= end:
            made[str(end)] = running.hexdigest()[:16]
            end = next(waiting, 2**63)
        running.update(f"{number} {word!a}\n".encode())
    return {**made, ALL: running.hexdigest()[:16]}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
