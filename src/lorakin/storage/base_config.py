"""What an adapter remembers of its base's config: all in it that changes what the weights compute.

The same weights with another number of heads, base of the rotary angles, epsilon or activation are
another model. Left aside is what says nothing of that: names and versions, precision and kernels,
what only training or generation reads, and counts that the weights' shapes show.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lorakin.storage.schema import shown

FIELD = "config"
ASIDE = re.compile(
    r"_.*|.*name_or_path|architectures|auto_map|.*version|.*dtype|.*_implementation|model_type"
    r"|tokenizer_class|id2label|label2id|num_labels|problem_type|finetuning_task"
    r"|task_specific_params|.*token_ids?|.*token_index|use_cache|quantization_config"
    r"|return_dict.*|use_return_dict|output_.*|torchscript|gradient_checkpointing"
    r"|.*dropout.*|.*drop|.*_loss.*|init_.*|initializer.*|.*_init(_.*)?|chunk_size_feed_forward"
    r"|pretraining_tp|vocab_size|tie_word_embeddings|max_position_embeddings|n_positions"
    r"|max_window_layers|is_encoder_decoder"
)
"""Keys that say nothing of what the weights compute, in a config and in its parts."""
CLOSE = 1e-6
"""Relative: a number that passed through a float32, as in a GGUF file, is the same."""
Scalar = bool | int | float | str | None


def known(model: nn.Module) -> dict[str, Any]:
    """Its part of a fingerprint, by key; {} for a model without a config of transformers."""
    as_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return {FIELD: dict(_values(as_dict()))} if callable(as_dict) else {}


def difference(remembered: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first key with different values in both, in words; versions differ in their keys."""
    then, now = remembered.get(FIELD, {}), here.get(FIELD, {})
    for key, value in then.items():
        if key in now and not _is_same(value, now[key]):
            return f"where {key} is {shown(value)} in the config; here it is {shown(now[key])}"
    return None


def is_known(base: Mapping[str, Any]) -> bool:
    """Whether a fingerprint from a file says of the config what `known` could have said."""
    said = base.get(FIELD, {})
    return isinstance(said, dict) and all(_is_value(value) for value in said.values())


def _values(config: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if ASIDE.fullmatch(str(key)):
            continue
        if isinstance(value, Mapping):
            yield from _values(value, f"{before}{key}.")
        elif _is_value(value := list(value) if isinstance(value, tuple) else value):
            yield f"{before}{key}", value


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(not isinstance(one, list) and _is_value(one) for one in value)
    return isinstance(value, Scalar) and not (isinstance(value, float) and not math.isfinite(value))


def _is_same(then: Any, now: Any) -> bool:
    if isinstance(then, list) and isinstance(now, list):
        return len(then) == len(now) and all(map(_is_same, then, now))
    if isinstance(then, int | float) and isinstance(now, int | float):
        return then == now or (
            abs(then) < 2**63 and abs(now) < 2**63 and math.isclose(then, now, rel_tol=CLOSE)
        )
    return bool(then == now)
