"""An export under way: what is wanted, and the base with its adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import transformers

from lorakin.adapter import Adapter
from lorakin.conversion import as_lora
from lorakin.errors import SettingError
from lorakin.family.low_rank import Fit
from lorakin.storage import directory
from lorakin.switching import adapters
from lorakin.training.base_class import BaseClass, kind_for
from lorakin.training.chat_templates import use_template
from lorakin.training.encoding import encode, encode_labelled
from lorakin.training.limits import check_rows, places
from lorakin.training.models import Loaded, config_of
from lorakin.training.reading import read_rows
from lorakin.training.with_adapter import load_with_adapter, recipe_labels

CALIBRATION, READING, BATCH, LENGTH = 64, 16, 8, 512
"""Rows of the data that a nearest pair is fitted to, and rows to compare on; rows of a batch;
tokens of a row.
"""


@dataclasses.dataclass(frozen=True)
class Order:
    """What is wanted, as `lorakin export --help` describes it; None is the target's default."""

    adapter: str
    to: str
    out: str
    model: str | None = None
    dtype: str | None = None
    rank: int | None = None
    error: float | None = None
    portable: bool = False
    data: str | None = None
    max_kl: float | None = None
    verify: bool = True
    other_base: bool = False


class ExportJob:
    """An order under way: the base with its adapter, loaded when first asked for."""

    def __init__(self, order: Order, files: directory.AdapterFiles, name: str) -> None:
        self.order = order
        self.files = files
        self.name = name
        self.fits: Mapping[str, Fit] = {}
        self._loaded: Loaded | None = None

    def base(self) -> Loaded:
        """Returns the base with its adapter, in the dtype that the base is stored in."""
        if self._loaded is None:
            self._loaded = load_with_adapter(
                self.name, self.files, "base", other_base=self.order.other_base, any_head=True
            )
        return self._loaded

    def bare(self) -> Loaded:
        """Returns the base without adapters."""
        for adapter in adapters(self.base().model).values():
            adapter.remove()
        return self.base()

    def forget(self) -> None:
        """Frees the model's memory; it is loaded again when asked for."""
        self._loaded = None

    def kind(self) -> BaseClass:
        """Returns what the base is loaded as."""
        return kind_for(self.files, config_of(self.name), recipe_labels(self.files))

    def plain(self) -> Adapter:
        """Returns the adapter as plain LoRA, beside the original in the model."""
        loaded, order = self.base(), self.order
        fitted = [row["input_ids"] for row in self.parts[0]]
        pad = transformers.DataCollatorWithPadding(loaded.tokenizer)
        batches = [
            pad([{"input_ids": ids} for ids in fitted[n : n + BATCH]]).to(loaded.model.device)
            for n in range(0, len(fitted), BATCH)
        ]
        (adapter,) = adapters(loaded.model).values()
        made = as_lora(
            adapter, rank=order.rank, error=order.error, batches=batches, portable=order.portable
        )
        self.fits = made.fits
        return made.adapter

    def _rows(self) -> Sequence[Mapping[str, Any]]:
        if self.order.data is None:
            return []
        rows, loaded = read_rows(self.order.data), self.base()
        if loaded.tokenizer is None:
            raise SettingError(
                f"--data holds text, and {self.name} has no tokenizer to read it with"
            )
        length = min(LENGTH, places(loaded.model) or LENGTH)
        if rows.is_classification:
            names = loaded.model.config.id2label
            found = encode_labelled(
                rows, loaded.tokenizer, length, [names[n] for n in sorted(names)]
            )
        else:
            use_template(loaded.tokenizer, True, rows)
            found = encode(rows, loaded.tokenizer, length)
        check_rows(found.examples, loaded, found.where, rows.name)
        return found.examples

    def texts(self) -> list[list[int]]:
        """Returns the token ids to compare on, from rows that no pair is fitted to."""
        return [row["input_ids"] for row in self.parts[1]]

    @cached_property
    def parts(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        """Rows to fit to, and about a quarter to compare on, as token ids and labels."""
        rows = self._rows()
        apart = min(READING, len(rows) // 4)
        return rows[: len(rows) - apart][:CALIBRATION], rows[len(rows) - apart :]
