"""Chat templates that installed packages carry, and a tokenizer for each: bytes, and the template's
special tokens.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from serving.words import byte_tokenizer

SPECIAL = re.compile(
    r"<\|?[a-z_]+\|>|<\|[a-z_]+\|?>|<\|\"\|>|<\|[^|<>\n]+\|>|<｜[^｜]+｜>|</?s>|\[/?[A-Z_]+\]|\[gMASK\]|<sop>"
    r"|<(?:bos|eos|start_of_turn|end_of_turn|end_of_utterance|start_of_image)>|<SPECIAL_\d+>"
)
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
    "<end_of_utterance>",
    "<eos>",
    "<|eot|>",
)
MISTRAL = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set "
    "loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if message.role == 'user' %}"
    "{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message.content "
    "+ '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message.content|trim + eos_token }}{%- endif %}{%- endfor %}"
)
"""As Mistral's third version writes turns: the system's words stand in the last turn of the user
alone.
"""


@cache
def templates() -> dict[str, str]:
    """Every chat template in the packages trl and transformers, by the place where it stands."""
    found = {"mistral": MISTRAL}
    for package in ("trl", "transformers"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        root = Path((spec.submodule_search_locations or [""])[0])
        for path in sorted(root.rglob("*.jinja")):
            found[f"{package}/{path.relative_to(root).as_posix()}"] = path.read_text(
                encoding="utf-8"
            )
        for path in sorted(root.rglob("processing_*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = node.value if isinstance(node, ast.Constant) else None
                if (
                    isinstance(text, str)
                    and text.count("{%") > 2
                    and "message" in text
                    and "for " in text
                ):
                    found[f"{package}/{path.relative_to(root).as_posix()}:{node.lineno}"] = text  # type: ignore[attr-defined]
    return found


def _short(place: str) -> str:
    path = Path(place.partition(":")[0])
    return f"transformers_{path.parent.name}" if place.startswith("transformers/") else path.stem


TEMPLATES = {_short(place): text for place, text in templates().items()}
"""The same by short names."""


def tokenizer_of(template: str | None, eos: str | None = None, merges: bool = False) -> Any:
    """A byte-level tokenizer with a template and its special tokens, and an end of text.

    Without merges each byte is a token, so that it cuts every text at every place.
    """
    special = set(SPECIAL.findall(template or ""))
    usual = "</s>" if "[INST]" in special else "<|endoftext|>"
    eos = eos or next((end for end in ENDS if end in special), usual)
    begins = ("<s>", "<|begin_of_text|>", "<bos>")
    bos = next((begin for begin in begins if begin in special), "<s>")
    raw = tokenizers.Tokenizer.from_str(_bytes(merges))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    named = {"bos_token": bos, "eos_token": eos, "pad_token": "<pad>"}
    others = sorted(special - set(named.values()))
    made.add_special_tokens({**named, "additional_special_tokens": others})
    made.chat_template = template
    return made


@cache
def _bytes(merges: bool) -> str:
    if merges:
        return str(byte_tokenizer().backend_tokenizer.to_str())
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    return str(raw.to_str())


def spaced_tokenizer() -> Any:
    """A tokenizer with a mark for spaces that puts one before every text, as SentencePiece's do."""
    letters = "".join(map(chr, range(33, 127)))
    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        "▁",
        *letters,
        *(f"▁{c}" for c in letters),
        "▁Paris",
        "\n",
    ]
    words = [(word, -1.0 if len(word) > 2 else -10.0) for word in vocabulary]
    raw = tokenizers.Tokenizer(tokenizers.models.Unigram(words, unk_id=0, byte_fallback=False))
    raw.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    raw.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
