"""Adapters on disk as one: their weighted sum, compared with the exact sum, or what else combines them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import lorakin
from lorakin.adapter import load
from lorakin.combined import checked_combination, combine
from lorakin.serving.output import new_directory, write_report
from lorakin.serving.verify import check_limit, compare, record, tolerance_for
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
    """Write the adapters in the directories `parts` (directory → weight), combined, into the new directory `out`.

    Args:
        settings: `how`, `on`, `density`, `elect` and `seed` of `lorakin.combine`.

    Returns:
        The report: ranks, errors, and how far the model with what was written is from the model with the exact combination. One
        of full rank is never put into the model: there the model with its nearest pair stands in its place, and the errors say
        how far that is from it.

    Raises:
        LorakinError: an adapter cannot be loaded or added, or a sum of limited rank is not near enough. `out` is as it was.
    """
    check_limit(max_kl)
    rule = checked_combination(rank=rank, error=error, **settings)
    with new_directory(out) as partial:
        loaded = load_model(model, "base")
        weights = {}
        for number, (directory, weight) in enumerate(parts.items()):
            load(loaded.model, directory, name=f"part{number}", other_base=other_base)
            weights[f"part{number}"] = weight
        limits: dict[str, Any] = {"rank": rank, "error": error}
        summed = combine(
            loaded.model, weights, "exact", **settings, **({} if rule.is_low_rank else limits)
        )
        transcript = record(loaded) if verify else None
        if rule.is_low_rank and (rank is not None or error is not None):
            summed = combine(loaded.model, weights, **settings, **limits)
        summed.adapter.save(partial)
        report: dict[str, Any] = {
            "lorakin": lorakin.__version__,
            "parts": dict(parts),
            "how": {
                name: value for name, value in dataclasses.asdict(rule).items() if value is not None
            },
            "ranks": sorted({fit.rank for fit in summed.fits.values()}),
            "largest_relative_error": max((fit.error for fit in summed.fits.values()), default=0.0),
            "verified": None,
        }
        if transcript is not None:
            written = load(loaded.model, partial, name="written", other_base=other_base)
            agreement = compare(transcript, loaded.model)
            is_nearest = rule.is_low_rank and report["largest_relative_error"] > 0
            agreement.check(
                tolerance_for((loaded.dtype,), is_nearest, max_kl),
                "the combination that was written",
            )
            report["verified"] = agreement.as_dict()
            report["agreement"] = str(agreement)
            report["compared_with"] = (
                "the exact combination"
                if rule.is_low_rank
                else "its nearest pair, before it was written"
            )
            written.remove()
        write_report(partial, report)
    return report
