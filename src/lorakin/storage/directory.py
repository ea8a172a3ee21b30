"""An adapter's directory: PEFT's two files, beside them lorakin's own part, and a model card."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lorakin.errors import AdapterError, LorakinWarning
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.trainable_tokens import ids_at
from lorakin.storage import atomic, card, json_files, own_part, texts
from lorakin.storage.document import Document
from lorakin.storage.fingerprint import difference, fingerprint
from lorakin.storage.json_files import no_json, parsed
from lorakin.storage.match import match
from lorakin.storage.own_part import CONFIG, OLD_TENSORS, OWN, OWN_TENSORS, TENSORS, Beside, Own
from lorakin.storage.peft import shared_pair
from lorakin.storage.peft.forms import PREFIX
from lorakin.storage.peft.reading import document_of
from lorakin.storage.peft.writing import written
from lorakin.storage.pickles import tensors_of
from lorakin.storage.trained import check_trained


@dataclasses.dataclass(frozen=True)
class Files:
    """What an adapter's directory holds, before it is matched with a model."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    beside: Beside

    @property
    def own(self) -> Own | None:
        """lorakin's own part, where there is one that belongs to PEFT's files."""
        return self.beside.own

    @property
    def base(self) -> Mapping[str, Any] | None:
        """The fingerprint of the base that the adapter was made on, if it remembers one."""
        return self.beside.base

    def match(self, model: nn.Module, other_base: bool = False) -> Document:
        """The adapter's document, as it goes into `model`, which is left as it is.

        Raises:
            AdapterError: the files do not fit the model; or they remember another base than this
                one, unless `other_base`.
        """
        where = str(self.path)
        found = document_of(self.config, self.tensors, self.own, model, where)
        document = match(found, model, where)
        self.check()
        if self.base and not other_base:
            self._check_base(self.base, document, model)
        return document

    def _check_base(
        self, remembered: Mapping[str, Any], document: Document, model: nn.Module
    ) -> None:
        here = fingerprint(model, ids_at(document.placement.tokens))
        if apart := difference(remembered, here):
            random = (
                "Rows that a resize added are random where the adapter does not train them. "
                if document.rows
                else ""
            )
            raise AdapterError(
                f"{self.path}: it is for another base model: {apart}. {random}Load that base, or, "
                "if this one is meant, say so with other_base=True or --other-base"
            )
        for said in texts.differences(remembered, here):
            warnings.warn(
                f"{self.path}: {said} than when the adapter was made, so it may answer otherwise",
                LorakinWarning,
                stacklevel=5,
            )

    def check(self) -> None:
        """Raises `AdapterError` if `lorakin.json`, or the config beside it, is not as written.

        Called last, so that a fault that says more is reported first.
        """
        if not self.beside.is_sound:
            raise own_part.unsound(self.path)
        then = self.beside.config
        if then is not None and (error := own_part.disagreement(self.path, then, self.config)):
            raise error


def save(
    adapter: InsertedAdapter,
    path: Path,
    notes: Mapping[str, object] | None = None,
    home: str | None = None,
) -> Path:
    """Writes the adapter into the directory `path`, made if need be: all of its files or none.

    Among them is a model card, README.md, unless somebody has written or edited the one there.
    `notes` and `home` are for the card: see `card.content`.

    Raises:
        OutputError: it cannot be written; an adapter that was there is intact.
    """
    adapter.tensors.check_sizes()
    document = Document.of(adapter)
    peft = written(document, adapter.model)
    form = peft.form
    shared = {} if form is None else shared_pair.shared_by_all(document, form)
    said, tensors = own_part.written(
        document,
        peft.tensors,
        PREFIX,
        with_slots=form is None,
        projection=shared_pair.checksum(shared) if shared else None,
        base=fingerprint(adapter.model, ids_at(adapter.placement.tokens), again=True),
    )
    files = {TENSORS: _tensor_file(peft.tensors), CONFIG: json_files.written(peft.config)}
    if tensors:
        files[OWN_TENSORS] = _tensor_file(tensors)
    files[OWN] = json_files.written(own_part.sealed(said, files, peft.config))
    text = card.content(adapter, peft.config, notes or {}, home, converted=form is None)
    if (readme := card.for_saving(path / card.CARD, text)) is not None:
        files[card.CARD] = readme
    # An adapter saved here earlier may have left this file behind.
    without = [] if tensors else [OWN_TENSORS]
    atomic.write(path, files, without=without)
    return path


def _tensor_file(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(dict(tensors), metadata={"format": "pt"})


def read(path: Path) -> Files:
    """Reads an adapter's directory, lorakin's or PEFT's; changes nothing.

    The files are those of one save, also while another save is under way.

    Raises:
        AdapterError: no directory, no config, no tensors, or files that are damaged.
    """
    if not path.is_dir():
        raise AdapterError(f"there is no adapter directory {path}")
    try:
        found = atomic.read(path, (CONFIG, TENSORS, OWN, OWN_TENSORS))
        if TENSORS not in found:
            found = atomic.read(path, (CONFIG, OLD_TENSORS, OWN, OWN_TENSORS))
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error})") from None
    if CONFIG not in found:
        raise no_json(path / CONFIG)
    config, tensors = parsed(path / CONFIG, found[CONFIG]), _read_tensors(path, found)
    return Files(path, config, tensors, own_part.read_beside(path, found, tensors))


def _read_tensors(path: Path, found: Mapping[str, bytes]) -> dict[str, Tensor]:
    try:
        if TENSORS in found:
            return own_part.tensors_in(found[TENSORS])
        if OLD_TENSORS in found:
            return tensors_of(path / OLD_TENSORS, found[OLD_TENSORS])
        raise AdapterError(f"{path} has no {TENSORS}")
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, OverflowError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: its tensors cannot be read ({error})") from None


__all__ = [
    "CONFIG",
    "OLD_TENSORS",
    "OWN",
    "OWN_TENSORS",
    "TENSORS",
    "Files",
    "check_trained",
    "read",
    "save",
]
