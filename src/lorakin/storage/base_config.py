"""The config's part of a base's fingerprint: all keys that change what the weights compute.

The same weights with another number of heads, base of the rotary angles, epsilon or activation are
another model. `IGNORED_KEYS` do not change the function: names and versions, precision and kernels,
what only training or generation reads, and counts that the weights' shapes show.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lorakin.storage.schema import short_repr

FIELD = "config"
IGNORED_KEYS = re.compile(
    # Private ones, names and versions.
    r"_.*|.*name_or_path|architectures|auto_map|.*version|model_type|tokenizer_class"
    # The task; the fingerprint has labels and the model's class of their own.
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params"
    # Precision and kernels.
    r"|.*dtype|.*_implementation|quantization_config|torchscript|chunk_size_feed_forward"
    r"|pretraining_tp"
    # What generation reads, and what a forward returns.
    r"|.*token_ids?|.*token_index|use_cache|return_dict.*|use_return_dict|output_.*"
    # What training reads: dropout, losses, initialisation.
    r"|gradient_checkpointing|.*dropout.*|.*drop|.*_loss.*|init_.*|initializer.*|.*_init(_.*)?"
    # What the weights' names and shapes show, or what only limits the inputs' length.
    r"|vocab_size|tie_word_embeddings|is_encoder_decoder|max_position_embeddings|n_positions"
    r"|max_window_layers"
)
"""Keys, of a config and of its parts, that do not change what the weights compute."""
RELATIVE_TOLERANCE = 1e-6
"""A number that passed through a float32, as in a GGUF file, is the same within this."""
Scalar = bool | int | float | str | None


def fingerprint_of(model: nn.Module) -> dict[str, Any]:
    """Returns the config's part of a fingerprint; {} for a model without a transformers config."""
    as_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return {FIELD: dict(_values(as_dict()))} if callable(as_dict) else {}


def difference(remembered: Mapping[str, Any], present: Mapping[str, Any]) -> str | None:
    """Returns the first key with another value, in words; keys of one side alone do not count."""
    then, now = remembered.get(FIELD, {}), present.get(FIELD, {})
    for key, value in then.items():
        if key in now and not _is_same(value, now[key]):
            before, after = short_repr(value), short_repr(now[key])
            return f"where {key} is {before} in the config; here it is {after}"
    return None


def is_valid(base: Mapping[str, Any]) -> bool:
    """Returns whether the config's part of a fingerprint from a file has the right form."""
    config = base.get(FIELD, {})
    return isinstance(config, dict) and all(_is_value(value) for value in config.values())


def _values(config: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if IGNORED_KEYS.fullmatch(str(key)):
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
            abs(then) < 2**63
            and abs(now) < 2**63
            and math.isclose(then, now, rel_tol=RELATIVE_TOLERANCE)
        )
    return bool(then == now)
