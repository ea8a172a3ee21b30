"""The types of the fields of `adapter_config.json` that are read, whoever wrote the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from lorakin.family.settings import LARGEST_FLOAT32
from lorakin.inject.linear_regex import PatternError
from lorakin.inject.patterns import check, check_all
from lorakin.storage.schema import Check, Count

MOST = 1 << 16
"""Names, keys and layers of one field: as many as the largest mixtures have modules."""
MOST_IDS = 1 << 22
"""Ids of tokens of one field: more than any vocabulary has."""


def _is_pattern(value: str) -> bool:
    try:
        check(value)
    except PatternError:
        return False
    return True


def _are_patterns(value: Mapping[str, Any]) -> bool:
    try:
        check_all("", value)
    except PatternError:
        return False
    return len(value) <= MOST


def _is_bias_word(value: str) -> bool:
    return value in ("none", "all") or value.endswith("_only")


def _is_short(value: str) -> bool:
    return len(value) <= 100


Some = Check(f"at most {MOST:,} entries", lambda value: len(value) <= MOST)
Pattern = Annotated[
    str, Check("a regular expression that can be matched step by step", _is_pattern)
]
Name = Annotated[str, Check("a name of at most 1,000 characters", lambda value: len(value) <= 1000)]
Names = Annotated[list[Name], Some]
Patterns = Check(
    "regular expressions that can be matched step by step, and not too many of them", _are_patterns
)
Single = Annotated[
    float, Check("a number that float32 holds", lambda value: abs(value) <= LARGEST_FLOAT32)
]
Rank = Annotated[int, Check("a rank below 2**31", lambda value: 0 <= value < 2**31)]

Ids = Annotated[
    list[Count], Check(f"at most {MOST_IDS:,} ids of tokens", lambda value: len(value) <= MOST_IDS)
]

KINDS: Mapping[str, Any] = {
    **dict.fromkeys(("r", "init_r", "target_r"), Rank),
    **dict.fromkeys(("projection_prng_key", "tinit", "tfinal", "deltaT", "total_step"), Count),
    **dict.fromkeys(
        (
            "lora_alpha",
            "lora_dropout",
            "vera_dropout",
            "d_initial",
            "beta1",
            "beta2",
            "orth_reg_weight",
        ),
        Single,
    ),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "save_projection", "fan_in_fan_out", "inference_mode"), bool
    ),
    **dict.fromkeys(("target_modules", "exclude_modules"), Pattern | Names),
    **dict.fromkeys(("modules_to_save", "target_parameters"), Names),
    **dict.fromkeys(
        ("task_type", "peft_type", "peft_version"),
        Annotated[str, Check("a word", _is_short)],
    ),
    **dict.fromkeys(("base_model_name_or_path", "revision"), str),
    "layers_pattern": Pattern
    | Annotated[list[Pattern], Check("at most 100 patterns", lambda value: len(value) <= 100)],
    "layers_to_transform": Count | Annotated[list[Count], Some],
    "rank_pattern": Annotated[dict[str, Count | list[bool]], Patterns],
    "alpha_pattern": Annotated[dict[str, Single], Patterns],
    "init_lora_weights": bool | str,
    "auto_mapping": dict[str, Any],
    "bias": Annotated[str, Check("none, all or lora_only", _is_bias_word)],
    "token_indices": Ids,
    "trainable_token_indices": Ids | Annotated[dict[Name, Ids], Some],
}
"""Field -> what it must hold if it is there and not null, which is PEFT's own "not set"."""
