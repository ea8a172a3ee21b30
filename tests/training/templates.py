"""Chat templates of real models, as the installed trl carries them, on a small tokenizer that has their tokens."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import trl

from serving.words import byte_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
SPECIAL = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?[a-z_]{1,30}>|<[a-z_]+\|>|<\|[a-z_]+>|\[/?[A-Z_]+\]|<[｜|][^｜|<>]+[｜|]>|<\|(?:START|END|CHATBOT|USER|SYSTEM)[A-Z_]*\|>"
)
"""What looks like one token in a template."""


@functools.cache
def _bytes() -> str:
    return str(byte_tokenizer().backend_tokenizer.to_str())


def tokenizer_of(template: str | None, bos: str | None = "<s>", eos: str = "</s>") -> Any:
    """A byte-level tokenizer that has the template, its special tokens, and these two."""
    import transformers
    from tokenizers import Tokenizer

    made = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_bytes()))
    named = {"eos_token": eos, "pad_token": eos, **({"bos_token": bos} if bos else {})}
    found = set(SPECIAL.findall(template or "")) - set(named.values())
    made.add_special_tokens({**named, "additional_special_tokens": sorted(found)})
    made.chat_template = template
    return made
