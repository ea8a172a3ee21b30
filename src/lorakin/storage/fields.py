"""What the fields of `adapter_config.json` that are read must hold, whoever wrote it."""

from __future__ import annotations

import re
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable, Mapping
from typing import Any

REPEATS = 6
"""Open repeats in a pattern; PEFT's own have up to four."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63  # so NaN is none


def _count(value: Any) -> bool:
    return isinstance(value, int) and _number(value) and value >= 0


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _pattern(value: Any) -> bool:
    """A regular expression that can be matched in reasonable time: no open repeat inside another, and few of them."""
    if not isinstance(value, str):
        return False
    try:
        tree = parser.parse(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return 0 <= _open_repeats(tree, inside=False) <= REPEATS


def _open_repeats(tree: Any, inside: bool) -> int:
    """How many repeats without a limit there are; -1 if one is inside another, or repeats a choice."""
    count = 0
    for operation, content in tree:
        is_open = operation in (parser.MAX_REPEAT, parser.MIN_REPEAT) and content[1] == parser.MAXREPEAT
        if inside and (is_open or operation is parser.BRANCH):
            return -1
        for part in _parts(content):
            found = _open_repeats(part, inside or is_open)
            if found < 0:
                return -1
            count += found
        count += is_open
    return count


def _parts(content: Any) -> list[Any]:
    """The sub-expressions in what an operation holds."""
    if isinstance(content, parser.SubPattern):
        return [content]
    return [part for one in content for part in _parts(one)] if isinstance(content, tuple | list) else []


def _names(value: Any) -> bool:
    return _pattern(value) or (isinstance(value, list) and all(map(_text, value)))


def _patterns_or_one(value: Any) -> bool:
    return _pattern(value) or (isinstance(value, list) and all(map(_pattern, value)))


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
    ("a regular expression or a list of names", _names, ("target_modules", "exclude_modules")),
    ("a regular expression or a list of them", _patterns_or_one, ("layers_pattern",)),
    ("a list of names", lambda value: _names(value) and not _text(value), ("modules_to_save", "target_parameters")),
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
