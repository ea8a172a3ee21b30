"""What the fields of `adapter_config.json` that are read must hold, whoever wrote it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63  # so NaN is none


def _count(value: Any) -> bool:
    return isinstance(value, int) and _number(value) and value >= 0


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _names(value: Any) -> bool:
    return _pattern(value) or (isinstance(value, list) and all(map(_text, value)))


def _layers(value: Any) -> bool:
    return _count(value) or (isinstance(value, list) and all(map(_count, value)))


def _kept(value: Any) -> bool:
    return _count(value) or (isinstance(value, list) and all(map(_flag, value)))


def _patterns(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_pattern(key) and holds(entry) for key, entry in value.items())


KINDS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "a whole number ≥ 0",
        _count,
        ("r", "init_r", "target_r", "projection_prng_key", "tinit", "tfinal", "deltaT", "total_step"),
    ),
    (
        "a finite number",
        _number,
        ("lora_alpha", "lora_dropout", "vera_dropout", "d_initial", "beta1", "beta2", "orth_reg_weight"),
    ),
    ("true or false", _flag, ("use_rslora", "use_dora", "save_projection", "fan_in_fan_out", "inference_mode")),
    ("a regular expression or a list of names", _names, ("target_modules", "exclude_modules", "layers_pattern")),
    ("a list of names", lambda value: _names(value) and not _text(value), ("modules_to_save",)),
    ("text", _text, ("base_model_name_or_path", "task_type")),
    ("a layer's number or a list of them", _layers, ("layers_to_transform",)),
    ("regular expressions with ranks", _patterns(_kept), ("rank_pattern",)),
    ("regular expressions with numbers", _patterns(_number), ("alpha_pattern",)),
)


def misfit(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the first field that holds something else than it must; `None` is PEFT's own "not set"."""
    for kind, holds, fields in KINDS:
        for field in fields:
            if config.get(field) is not None and not holds(config[field]):
                return f"{field} is {str(config[field])[:80]!r}, expected {kind}"
    return None
