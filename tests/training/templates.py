"""Chat templates that installed packages carry, by short names, and small tokenizers with merges that have their tokens."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer

from serving.words import byte_tokenizer
from training.carried import SPECIAL, templates


def _short(place: str) -> str:
    path = Path(place.partition(":")[0])
    return f"transformers_{path.parent.name}" if place.startswith("transformers/") else path.stem


TEMPLATES = {_short(place): text for place, text in templates().items()}


@functools.cache
def _bytes() -> str:
    return str(byte_tokenizer().backend_tokenizer.to_str())


def tokenizer_of(template: str | None, eos: str = "</s>") -> Any:
    """A byte-level tokenizer with the template, its special tokens, <s>, and an end of text that need not be the template's."""
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bytes()))
    named = {"bos_token": "<s>", "eos_token": eos, "pad_token": eos}
    found = set(SPECIAL.findall(template or "")) - set(named.values())
    made.add_special_tokens({**named, "additional_special_tokens": sorted(found)})
    made.chat_template = template
    return made
