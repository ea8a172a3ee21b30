"""An export while it runs: the request, and the base with its adapter."""

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
from lorakin.training.encoding import encode
from lorakin.training.limits import check_rows, position_count
from lorakin.training.models import Loaded, config_of
from lorakin.training.reading import read_rows
from lorakin.training.tasks import task_of_model
from lorakin.training.with_adapter import load_with_adapter, recipe_labels

FITTED_ROWS, COMPARED_ROWS, BATCH, LENGTH = 64, 16, 8, 512
"""The most rows of the data that a nearest pair is fitted to, and that models are compared on; the
rows of a batch; the tokens of a row."""


Rows = Sequence[Mapping[str, Any]]
"""Rows of data as token ids and labels."""


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """The options of `lorakin export`, as `--help` describes them; None is the target's default."""

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
    """An export while it runs, with the base and its adapter, which are loaded at the first use.

    Attributes:
        request: what is to be exported.
        files: the adapter's files.
        name: the base model's name.
        fits: for each module, how near a plain pair is to the adapter's change.
    """

    def __init__(self, request: ExportRequest, files: directory.AdapterFiles, name: str) -> None:
        self.request = request
        self.files = files
        self.name = name
        self.fits: Mapping[str, Fit] = {}
        self._loaded: Loaded | None = None

    def loaded(self) -> Loaded:
        """Returns the base with its adapter, in the dtype that the base is stored in."""
        if self._loaded is None:
            self._loaded = load_with_adapter(
                self.name, self.files, "base", other_base=self.request.other_base, any_head=True
            )
        return self._loaded

    def base_alone(self) -> Loaded:
        """Removes all adapters from the base, and returns it."""
        for adapter in adapters(self.loaded().model).values():
            adapter.remove()
        return self.loaded()

    def forget(self) -> None:
        """Frees the model's memory; it is loaded again at the next use."""
        self._loaded = None

    def base_class(self) -> BaseClass:
        """Returns which transformers class the base is loaded as."""
        return kind_for(self.files, config_of(self.name), recipe_labels(self.files))

    def add_plain_lora(self) -> Adapter:
        """Adds the adapter as plain LoRA to the model, next to the original, and returns it."""
        loaded, request = self.loaded(), self.request
        fitted = [row["input_ids"] for row in self.fit_and_compare_rows[0]]
        pad = transformers.DataCollatorWithPadding(loaded.tokenizer)
        batches = [
            pad([{"input_ids": ids} for ids in fitted[n : n + BATCH]]).to(loaded.model.device)
            for n in range(0, len(fitted), BATCH)
        ]
        (adapter,) = adapters(loaded.model).values()
        plain = as_lora(
            adapter,
            rank=request.rank,
            error=request.error,
            batches=batches,
            portable=request.portable,
        )
        self.fits = plain.fits
        return plain.adapter

    def _rows(self) -> Rows:
        if self.request.data is None:
            return []
        rows, loaded = read_rows(self.request.data), self.loaded()
        if loaded.tokenizer is None:
            raise SettingError(
                f"--data holds text, and {self.name} has no tokenizer to read it with"
            )
        length = min(LENGTH, position_count(loaded.model) or LENGTH)
        if rows.has_labels:
            encoded = task_of_model(rows, loaded.model).encode(rows, loaded.tokenizer, length)
        else:  # prompts with their answers, also where an encoder would read the prompts alone
            use_template(loaded.tokenizer, True, rows)
            encoded = encode(rows, loaded.tokenizer, length)
        check_rows(encoded.examples, loaded, encoded.where, rows.name)
        return encoded.examples

    def compared_ids(self) -> list[list[int]]:
        """Returns the token ids of the rows to compare on, which no pair is fitted to."""
        return [row["input_ids"] for row in self.fit_and_compare_rows[1]]

    @cached_property
    def fit_and_compare_rows(self) -> tuple[Rows, Rows]:
        """The rows to fit to, and about a quarter to compare on, as token ids and labels."""
        rows = self._rows()
        fitted = len(rows) - min(COMPARED_ROWS, len(rows) // 4)
        return rows[:fitted][:FITTED_ROWS], rows[fitted:]
