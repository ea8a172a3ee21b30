"""What an export was made from, so that it can be told whether it is still fresh."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from lorakin.serving.job import ExportRequest
from lorakin.serving.output import REPORT
from lorakin.storage import hub
from lorakin.storage.card import CARD
from lorakin.training import model_files
from lorakin.training.model_sources import directory_of

ABOUT_THE_CHECK = ("out", "verify", "max_kl")
"""Settings of a request that change nothing in what is written."""


def sources_of(folder: Path | None, base: str) -> dict[str, str]:
    """Returns the adapter's files with their SHA-256, and the base's with sizes and times.

    Args:
        folder: the adapter's directory; None for the base alone.
        base: the base's name.
    """
    found = {}
    names = [] if folder is None else [name for name in hub.FILES if name != CARD]
    for name in names:
        if folder is not None and (folder / name).is_file():
            found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    for file in model_files.weight_files(directory_of(base))[0]:
        about = file.stat()
        found[str(file)] = f"{about.st_size} bytes, {about.st_mtime_ns}"
    return found


def is_fresh(out: Path, request: ExportRequest, made_from: dict[str, str]) -> bool:
    """Returns whether `out` holds what this request would write now from these files."""
    report = report_in(out)
    return (
        report is not None
        and report.get("made_from") == made_from
        and _without_check(report.get("order")) == _without_check(dataclasses.asdict(request))
    )


def report_in(out: Path) -> dict[str, Any] | None:
    """Returns the report of the export in `out`; None if there is none."""
    try:
        report = json.loads((out / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and "lorakin" in report else None


def _without_check(order: Any) -> Any:
    if not isinstance(order, dict):
        return None
    return {key: value for key, value in order.items() if key not in ABOUT_THE_CHECK}
