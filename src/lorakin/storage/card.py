"""Writes the model card, README.md, beside an adapter: what it is, how it was made, how to load it.

The last line has a checksum of the rest. A README.md without it, or with another one, was written
or edited by a person and is not overwritten. Names and texts from outside are put in code spans;
the front matter takes only words of a fixed alphabet.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorakin.errors import AdapterError
from lorakin.inject.counts import parameter_counts, tensors_of, trained_by_method
from lorakin.inject.description import (
    biases_in_words,
    count,
    in_words,
    listed,
    module_names,
    ranks_in_words,
    share,
)
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.quantised import is_quantised
from lorakin.inject.status import class_without_mixins
from lorakin.storage import files

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
"""PEFT's `task_type` → the hub's `pipeline_tag`, where there is exactly one."""
TAGS = "lora lorakin".split()
"""Tags on the hub by which people look for adapters of any LoRA method."""
LONGEST_CARD = 1 << 20
ANYWHERE = "path/to/this/directory"
"""What examples load, if it is not known where the adapter will be."""
LONGEST = 300
"""Characters of a name or a note; what is longer is cut."""


def content(
    adapter: InsertedAdapter,
    config: Mapping[str, Any],
    notes: Mapping[str, object],
    home: str | None = None,
    converted: bool = False,
) -> str:
    """Returns the text of an adapter's card; the same for the same adapter, base and versions.

    Args:
        adapter: the adapter.
        config: the `adapter_config.json` beside the card.
        notes: what else is known, such as data and figures: heading → text.
        home: the hub id that it is uploaded to, if that is known.
        converted: whether PEFT's files hold it as plain LoRA, not as its own method.
    """
    loading = _loading(adapter, config, home, converted)
    body = "\n".join([*_front(adapter, config), "", *_facts(adapter, notes), "", *loading, ""])
    return f"{body}\n{_mark(body)}"


def for_saving(path: Path, text: str) -> bytes | None:
    """Returns the card `text` as bytes for the file `path`; None if a person wrote that file."""
    try:
        present = files.read_limited(path, LONGEST_CARD).decode("utf-8")
    except FileNotFoundError:
        return text.encode()
    except (OSError, UnicodeDecodeError, AdapterError):  # something that is not a card
        return None
    return text.encode() if is_generated(present) else None


def is_generated(text: str) -> bool:
    """Returns whether lorakin wrote a README.md and nobody changed it since; ends of lines may."""
    body, _, last = text.replace("\r\n", "\n").removesuffix("\n").rpartition("\n")
    return last + "\n" == _mark(body)


def at_home(text: str, home: str) -> str | None:
    """Returns a card that lorakin wrote with the hub id `home` in its examples.

    None if a person wrote or edited the card, or `home` is no hub id.
    """
    if not is_generated(text) or not HUB_ID.fullmatch(home):
        return None
    body = text.replace("\r\n", "\n").removesuffix("\n").rpartition("\n")[0]
    body = body.replace(f'"{ANYWHERE}"', f'"{home}"')
    return f"{body}\n{_mark(body)}"


def _mark(body: str) -> str:
    digest = hashlib.sha256(body.encode()).hexdigest()
    note = f"written by lorakin, sha256 {digest}; once you edit this file lorakin leaves it alone"
    return f"<!-- {note} -->\n"


def _front(adapter: InsertedAdapter, config: Mapping[str, Any]) -> list[str]:
    """Returns the YAML that the hub reads; it shows adapters by `library_name: peft`."""
    base, task = base_id(adapter), PIPELINES.get(str(config.get("task_type")))
    tags = [*TAGS, *(member.word for member in adapter.method.members)]
    return [
        "---",
        *([f'base_model: "{base}"', "base_model_relation: adapter"] if base else []),
        "library_name: peft",
        *([f"pipeline_tag: {task}"] if task else []),
        "tags:",
        *(f'- "{tag}"' for tag in dict.fromkeys(tags) if re.fullmatch(r"[\w.+-]+", tag, re.ASCII)),
        "---",
    ]


def base_id(adapter: InsertedAdapter) -> str | None:
    """Returns the base's hub id; None for a local directory, which means nothing elsewhere."""
    name = getattr(adapter.model, "name_or_path", None)
    config = getattr(adapter.model, "config", None)
    if not isinstance(name, str) or not HUB_ID.fullmatch(name) or os.path.exists(name):
        return None
    # transformers sets it when it has asked the hub.
    fetched = getattr(config, "_commit_hash", None)
    return name if "/" in name or fetched else None


def _facts(adapter: InsertedAdapter, notes: Mapping[str, object]) -> list[str]:
    words, placement = adapter.method.words, adapter.placement
    base, name = base_id(adapter), getattr(adapter.model, "name_or_path", None)
    kind = class_without_mixins(adapter.model)
    if base:
        base_name = f"[{_code(base)}](https://huggingface.co/{base})"
    else:
        base_name = _code(Path(name).name) if isinstance(name, str) and name else "not named"
    quantised = sum(is_quantised(module) for module in adapter.model.modules())
    ranks = ranks_in_words(adapter)
    trained, total = trained_by_method(adapter), parameter_counts(adapter.model)[1]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors_of(adapter)})
    packed = f", {count(quantised, 'layer')} of it quantised" if quantised else ""
    return [
        f"# {'An' if words[:1] in 'aeiou' else 'A'} {words} adapter",
        "",
        f"- **Base model:** {base_name} ({_code(kind.__name__)}{packed})",
        f"- **Method:** {_plain(in_words(adapter.method))}"
        + (f", of {ranks}" if " to " in ranks else ""),
        f"- **Adapted:** {count(len(placement.methods), 'module')}"
        + _of(module_names(placement.methods)),
        *(
            [f"- **Trained whole:** {_codes(placement.whole_modules)}"]
            if placement.whole_modules
            else []
        ),
        *(
            [f"- **Biases:** {biases_in_words(adapter)} in place of the base's"]
            if placement.biases
            else []
        ),
        f"- **Trained:** {share(trained, total)}, kept in {', '.join(dtypes)}",
        *(f"- **{_plain(heading)}:** {_plain(str(text))}" for heading, text in notes.items()),
        f"- **Versions:** {', '.join(_versions(kind))}",
    ]


def _of(names: list[str]) -> str:
    return f" ({_codes(names)})" if names else ""


def _codes(names: Any) -> str:
    return listed([_code(name) for name in names])


def _versions(kind: type) -> list[str]:
    import lorakin

    versions = [f"lorakin {lorakin.__version__}", f"torch {torch.__version__.partition('+')[0]}"]
    if _is_transformers(kind):
        versions.append(f"transformers {sys.modules['transformers'].__version__}")
    return versions


def _is_transformers(kind: type) -> bool:
    """Returns whether transformers exports the class under its name."""
    return (
        kind.__module__.startswith("transformers.")
        and getattr(sys.modules["transformers"], kind.__name__, None) is kind
    )


def _loading(
    adapter: InsertedAdapter, config: Mapping[str, Any], home: str | None, converted: bool
) -> list[str]:
    source = home if home and HUB_ID.fullmatch(home) else ANYWHERE
    base = _base_in_code(adapter, config)
    return [
        "## Load it",
        "",
        "With [lorakin](https://pypi.org/project/lorakin):",
        "",
        "```python",
        "import lorakin as lk",
        *base,
        f'lk.load(model, "{source}")',
        "```",
        "",
        f"With [PEFT](https://huggingface.co/docs/peft){_for_peft(config, converted)}",
        "",
        "```python",
        "from peft import PeftModel",
        *base,
        f'model = PeftModel.from_pretrained(model, "{source}")',
        "```",
    ]


def _base_in_code(adapter: InsertedAdapter, config: Mapping[str, Any]) -> list[str]:
    """Returns how the base is loaded, as lines of Python."""
    kind = class_without_mixins(adapter.model)
    if not _is_transformers(kind):
        return ["", "model = ...  # the base model, built as it was for training", ""]
    labels = getattr(getattr(adapter.model, "config", None), "num_labels", None)
    more = (
        f", num_labels={labels:d}"
        if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") and isinstance(labels, int)
        else ""
    )
    source = base_id(adapter) or "path/to/the/base/model"
    return [
        f"from transformers import {kind.__name__}",
        "",
        f'model = {kind.__name__}.from_pretrained("{source}"{more})',
    ]


def _for_peft(config: Mapping[str, Any], converted: bool) -> str:
    """Returns what a user of PEFT has to know, to follow the word PEFT."""
    experts, dora = config.get("target_parameters"), config.get("use_dora")
    if experts and dora:
        return (
            ", which refuses magnitudes on experts; `lorakin export --to lora` makes an adapter "
            "that it takes:"
        )
    note = f", for which it is {config['peft_type']}{' with `use_dora`' if dora else ''}"
    if converted:
        note += ", and only lorakin continues to train it with this method"
    if experts:
        note += "; experts in one parameter need a recent version, 0.21 was tried"
    return f"{note}:"


def _code(text: object) -> str:
    """Returns any text as a code span on one line."""
    plain = _one_line(str(text)) or "-"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    space = " " if len(ticks) > 1 else ""
    return f"{ticks}{space}{plain}{space}{ticks}"


def _plain(text: object) -> str:
    """Returns any text as a line of Markdown, with everything escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", _one_line(str(text)))


def _one_line(text: str) -> str:
    """Returns a text on one line, without what cannot be printed, cut to `LONGEST`."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text)
    words = " ".join(kept.split())
    return words if len(words) <= LONGEST else words[: LONGEST - 1] + "…"
