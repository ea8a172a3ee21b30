"""Combines adapters on disk into one, and compares the result with the exact combination."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import lorakin
from lorakin.combined import checked_combination, combine
from lorakin.family.low_rank import Fit
from lorakin.loading import load
from lorakin.serving.output import new_directory, write_report
from lorakin.serving.verify import check_limit, compare_logits, record_logits, tolerance_for
from lorakin.training.models import load_model


def combine_directories(
    parts: Mapping[str, float],
    model: str,
    out: str,
    *,
    rank: int | None = None,
    error: float | None = None,
    max_kl: float | None = None,
    verify: bool = True,
    other_base: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Writes the combination of adapters into the new directory `out`.

    Args:
        parts: the directory of an adapter → its weight.
        model: the base model.
        out: the new directory.
        rank, error: the limits of a low-rank sum; see `lorakin.combine`.
        max_kl: the largest tolerated mean KL in nats, instead of the default tolerance.
        verify: whether to compare what was written.
        other_base: whether the adapters may have been trained on another base.
        settings: `how`, `on`, `density`, `elect` and `seed` of `lorakin.combine`.

    Returns:
        the report: ranks, errors, and how far the model with what was written is from the exact
        combination. A combination of full rank is never put into the model: it is compared with
        its nearest pair, and the errors say how far that pair is from it.

    Raises:
        LorakinError: an adapter cannot be loaded or added, or a sum of limited rank is not near
            enough. `out` is as it was.
    """
    check_limit(max_kl)
    rule = checked_combination(rank=rank, error=error, **settings)
    with new_directory(out) as partial:
        loaded = load_model(model, "base")
        weights = {}
        for index, (directory, weight) in enumerate(parts.items()):
            load(loaded.model, directory, name=f"part{index}", other_base=other_base)
            weights[f"part{index}"] = weight

        limits: dict[str, Any] = {"rank": rank, "error": error}
        first_limits = {} if rule.is_low_rank else limits
        combined = combine(loaded.model, weights, "exact", **settings, **first_limits)
        transcript = record_logits(loaded) if verify else None
        if rule.is_low_rank and (rank is not None or error is not None):
            combined = combine(loaded.model, weights, **settings, **limits)
        combined.adapter.save(partial)
        report = _report(parts, rule, combined.fits)
        if transcript is not None:
            written = load(loaded.model, partial, name="written", other_base=other_base)
            agreement = compare_logits(transcript, loaded.model)
            is_nearest = rule.is_low_rank and report["largest_relative_error"] > 0
            tolerance = tolerance_for((loaded.dtype,), is_nearest, max_kl)
            agreement.check(tolerance, "the combination that was written")
            report["verified"] = agreement.as_dict()
            report["agreement"] = str(agreement)
            exact, nearest = "the exact combination", "its nearest pair, before it was written"
            report["compared_with"] = exact if rule.is_low_rank else nearest
            written.remove()
        write_report(partial, report)
    return report


def _report(parts: Mapping[str, float], rule: Any, fits: Mapping[str, Fit]) -> dict[str, Any]:
    """Returns the report of a combination that was not compared."""
    how = {name: value for name, value in dataclasses.asdict(rule).items() if value is not None}
    return {
        "lorakin": lorakin.__version__,
        "parts": dict(parts),
        "how": how,
        "ranks": sorted({fit.rank for fit in fits.values()}),
        "largest_relative_error": max((fit.error for fit in fits.values()), default=0.0),
        "verified": None,
    }
