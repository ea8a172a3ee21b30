"""What an adapter remembers of its base, so that it is not put on another one unnoticed.

Kept are a few numbers of a few weights, not a hash of them: a base loaded in bfloat16 has other bits than in float32, and is
the same base. Rounding to float16 or bfloat16 moves them by 0.2 % at most, another fine-tune of the same model by more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.surgery.graft import own_weight

MODULES, NUMBERS = 8, 16
TOLERANCE = 0.005
"""Relative: above what rounding does."""


def own_weights(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """Path → the base's own weight there, as a matrix, whatever adapters do with it at the moment."""
    return {path: own_weight(model.get_submodule(path)) for path in paths}


def fingerprint(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The base's class, model type and name, and numbers of its adapted `weights` (path → matrix), for `lorakin.json`."""
    return {
        "class": type(model).__name__,
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "name": getattr(model, "name_or_path", None) or None,
        "weights": {path: sample for path in _spread(list(weights)) if (sample := _sample(weights[path])) is not None},
    }


def is_fingerprint(value: Any) -> bool:
    """Whether `value`, from a file, has the form that `fingerprint` gives."""
    weights = value.get("weights") if isinstance(value, dict) else None
    return isinstance(weights, dict) and all(
        isinstance(numbers, list) and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        for numbers in weights.values()
    )


def difference(remembered: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str | None:
    """How the base with these adapted `weights` differs from the one remembered, or None if it is the same."""
    worst, where = 0.0, ""
    for path, numbers in dict(remembered.get("weights") or {}).items():
        here = _sample(weights[path]) if path in weights else None
        if here is None or len(here) != len(numbers):
            continue
        then, now = torch.tensor(numbers, dtype=torch.float64), torch.tensor(here, dtype=torch.float64)
        apart = float((then - now).norm() / max(float(then.norm()), 1e-30))
        if apart > worst:
            worst, where = apart, path
    if worst <= TOLERANCE:
        return None
    return f"it was made on {described(remembered)}, and the weight of {where} here is another: {worst:.1%} from that one"


def described(remembered: Mapping[str, Any]) -> str:
    """The base in words: `smollm2 (LlamaForCausalLM)`."""
    name, kind = remembered.get("name"), remembered.get("class")
    return f"{name} ({kind})" if name else str(kind)


def _spread(paths: Sequence[str]) -> list[str]:
    """At most `MODULES` of them, from first to last."""
    if len(paths) <= MODULES:
        return list(paths)
    return [paths[round(n * (len(paths) - 1) / (MODULES - 1))] for n in range(MODULES)]


def _sample(weight: Tensor) -> list[float] | None:
    """Numbers from all over the matrix; None if it has no values, or quantised ones."""
    if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
        return None
    flat = torch.linspace(0, weight.numel() - 1, min(NUMBERS, weight.numel()), dtype=torch.float64).round().long()
    rows, columns = flat // weight.shape[1], flat % weight.shape[1]
    return [float(f"{value:.6g}") for value in weight.detach()[rows.to(weight.device), columns.to(weight.device)].tolist()]
