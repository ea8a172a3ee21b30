"""A base model alone as a GGUF file, for adapters beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lorakin
from lorakin.errors import SettingError
from lorakin.serving.gguf_model import write_model
from lorakin.serving.output import new_directory, write_report
from lorakin.serving.sources import report_in, sources_of
from lorakin.serving.targets import GGUF_DTYPES
from lorakin.training.model_sources import directory_of
from lorakin.training.models import load_model

FILE = "model.gguf"


def check(dtype: str | None) -> None:
    """Raises `SettingError` if GGUF has no such dtype; None is the default."""
    if dtype is not None and dtype not in GGUF_DTYPES:
        raise SettingError(
            f"--dtype {dtype} is unknown here; choose from: {', '.join(GGUF_DTYPES)}"
        )


def write(out: Path, base: str, dtype: str, remove_old: Callable[[Path], None]) -> None:
    """Writes the base as `out`/model.gguf, unless it is there and fresh.

    Raises:
        ModelError: it cannot be loaded, or lorakin cannot write it.
    """
    made_from = sources_of(None, base)
    order = {"to": "gguf-base", "model": base, "dtype": dtype}
    present = report_in(out)
    if present and (present.get("order"), present.get("made_from")) == (order, made_from):
        return
    remove_old(out)
    with new_directory(str(out)) as partial:
        source, model = directory_of(base), load_model(base, "float32").model
        write_model(
            partial / FILE,
            model.config,
            source,
            model.state_dict(),
            dtype=GGUF_DTYPES[dtype],
            name=Path(base).name,
        )
        report = {"lorakin": lorakin.__version__, "order": order, "made_from": made_from}
        write_report(partial, report)
