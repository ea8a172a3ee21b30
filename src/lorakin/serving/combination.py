"""Adapters on disk as one: their weighted sum, compared with the exact sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lorakin
from lorakin.adapter import load
from lorakin.conversion import combine
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
) -> dict[str, Any]:
    """Write the sum of the adapters in the directories `parts` (directory → weight) into the new directory `out`.

    Returns:
        The report: ranks, errors, and how far the model with what was written is from the model with the exact sum.

    Raises:
        LorakinError: an adapter cannot be loaded or added, or the sum of limited rank is not near enough. `out` is as it was.
    """
    check_limit(max_kl)
    with new_directory(out) as partial:
        loaded = load_model(model, "base")
        weights = {}
        for number, (directory, weight) in enumerate(parts.items()):
            load(loaded.model, directory, name=f"part{number}", other_base=other_base)
            weights[f"part{number}"] = weight
        summed = combine(loaded.model, weights, "exact")
        transcript = record(loaded) if verify else None
        if rank is not None or error is not None:
            summed = combine(loaded.model, weights, rank=rank, error=error)
        summed.adapter.save(partial)
        report: dict[str, Any] = {
            "lorakin": lorakin.__version__,
            "parts": dict(parts),
            "ranks": sorted({fit.rank for fit in summed.fits.values()}),
            "largest_relative_error": max((fit.error for fit in summed.fits.values()), default=0.0),
            "verified": None,
        }
        if transcript is not None:
            written = load(loaded.model, partial, name="written", other_base=other_base)
            agreement = compare(transcript, loaded.model)
            is_nearest = report["largest_relative_error"] > 0
            agreement.check(tolerance_for((loaded.dtype,), is_nearest, max_kl), "the sum that was written")
            report["verified"] = agreement.as_dict()
            report["agreement"] = str(agreement)
            written.remove()
        write_report(partial, report)
    return report
