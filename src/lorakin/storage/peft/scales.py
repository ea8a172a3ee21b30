"""The rank and alpha of single modules in a config: reads, sets and removes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from lorakin.family import Method
from lorakin.inject.patterns import resolve

PATTERNS = (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
"""Per-module field → the field with the default."""


class PairScale(NamedTuple):
    """The rank and alpha of a pair, and how they make its scale."""

    rank: int
    alpha: float
    rslora: bool

    @property
    def value(self) -> float:
        """The factor in front of B·A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def scale_of(method: Method) -> PairScale:
    """Returns the rank and alpha of a method; zeros if its pair has no such settings."""
    pair = method.parametrisation
    return PairScale(
        getattr(pair, "rank", 0), getattr(pair, "alpha", 0.0), getattr(pair, "rslora", False)
    )


def scale_at(config: Mapping[str, Any], path: str) -> PairScale:
    """Returns the rank and alpha that a config gives the pair at `path`.

    >>> config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}}
    >>> scale_at(config, "layers.0.q_proj").value, scale_at(config, "layers.0.v_proj").value
    (4.0, 2.0)
    """
    rank = resolve(config.get("rank_pattern") or {}, path, config.get("r", 8))
    alpha = resolve(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8))
    return PairScale(int(rank or 0), float(alpha or 0), bool(config.get("use_rslora")))


def set_scale(config: dict[str, Any], path: str, scale: PairScale) -> None:
    """Changes `config` in place so that the module or stack at `path` has this rank and alpha."""
    for (field, usual), value in zip(PATTERNS, (scale.rank, scale.alpha), strict=True):
        patterns = config.get(field, {})
        if resolve(patterns, path, config[usual]) != value:
            config[field] = {f"^{re.escape(path)}": int_if_whole(value)} | patterns


def without_modules(config: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """Returns the config without the targets and patterns that name exactly these modules."""
    single = {f"^{re.escape(path)}" for path in paths}
    targets = [path for path in config["target_modules"] if path not in paths]
    rest = {**config, "target_modules": targets}
    for field, _ in PATTERNS:
        patterns = rest.pop(field, {})
        if left := {key: value for key, value in patterns.items() if key not in single}:
            rest[field] = left
    return rest


def int_if_whole(value: Any) -> Any:
    """Returns a float such as 2.0 as an int, since other readers insist on an int for alpha."""
    is_whole = isinstance(value, float) and value.is_integer() and value != 0
    return int(value) if is_whole else value
