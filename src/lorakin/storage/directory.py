"""An adapter's directory: PEFT's two files, lorakin's part beside them, and a model card."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lorakin.errors import AdapterError, LorakinWarning
from lorakin.family import Member, members
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.trainable_tokens import ids_at
from lorakin.storage import atomic, card, json_files, lorakin_part, tokenizer_fingerprint
from lorakin.storage.document import Document
from lorakin.storage.fingerprint import difference, fingerprint
from lorakin.storage.json_files import no_json, parsed
from lorakin.storage.lorakin_part import (
    CONFIG,
    LORAKIN_JSON,
    LORAKIN_TENSORS,
    OLD_TENSORS,
    TENSORS,
    LorakinPart,
    ReadLorakinPart,
)
from lorakin.storage.match import match
from lorakin.storage.peft import shared_pair
from lorakin.storage.peft.formats import PREFIX
from lorakin.storage.peft.reading import document_of
from lorakin.storage.peft.writing import peft_files_of
from lorakin.storage.pickles import tensors_of
from lorakin.storage.trained import check_trained


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's directory holds, before it is matched with a model."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    lorakin: ReadLorakinPart

    @property
    def lorakin_part(self) -> LorakinPart | None:
        """lorakin's part, if there is one that belongs to PEFT's files."""
        return self.lorakin.part

    @property
    def base(self) -> Mapping[str, Any] | None:
        """The fingerprint of the base that the adapter was made on, if it remembers one."""
        return self.lorakin.base

    def match(self, model: nn.Module, other_base: bool = False) -> Document:
        """Returns the adapter's document, matched with `model`, which is left as it is.

        Raises:
            AdapterError: the files do not fit the model; or they remember another base than this
                one, unless `other_base`.
        """
        where = str(self.path)
        document = document_of(self.config, self.tensors, self.lorakin_part, model, where)
        document = match(document, model, where)
        self.check_lorakin_part()
        if self.base and not other_base:
            self._check_base(self.base, document, model)
        return document

    def _check_base(
        self, remembered: Mapping[str, Any], document: Document, model: nn.Module
    ) -> None:
        present = fingerprint(model, ids_at(document.placement.tokens))
        if reason := difference(remembered, present):
            random = (
                "Rows that a resize added are random where the adapter does not train them. "
                if document.rows
                else ""
            )
            raise AdapterError(
                f"{self.path}: it is for another base model: {reason}. {random}Load that base; or, "
                "if this one is meant, pass other_base=True or --other-base"
            )
        for reason in tokenizer_fingerprint.differences(remembered, present):
            warnings.warn(
                f"{self.path}: {reason} than when the adapter was made, so it may answer "
                "differently",
                LorakinWarning,
                stacklevel=5,  # the caller of `lorakin.load`
            )

    def check_lorakin_part(self) -> None:
        """Raises `AdapterError` if `lorakin.json`, or the config beside it, is not as written.

        Called last, so that a fault that says more is reported first.
        """
        if not self.lorakin.is_sound:
            raise lorakin_part.damaged_error(self.path)
        then = self.lorakin.config
        if then is None:
            return
        if error := lorakin_part.config_mismatch(self.path, then, self.config):
            raise error


def _warn_of_unregistered(method_members: Iterable[Member]) -> None:
    known = {(kind.__module__, kind.__qualname__) for kind in members()}
    for kind in (type(member) for member in method_members):
        if (kind.__module__, kind.__qualname__) not in known:
            warnings.warn(
                f"{kind.__qualname__} is not registered, so nobody can load this adapter: decorate "
                "the class with lorakin.register, or name it among its package's entry points",
                LorakinWarning,
                stacklevel=3,
            )


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
    _warn_of_unregistered(adapter.method.members)
    document = Document.of(adapter)
    peft = peft_files_of(document, adapter.model)
    peft_format = peft.peft_format
    shared = {} if peft_format is None else shared_pair.shared_by_all(document, peft_format)
    content, tensors = lorakin_part.json_and_tensors_of(
        document,
        peft.tensors,
        PREFIX,
        with_slots=peft_format is None,
        projection=shared_pair.checksum(shared) if shared else None,
        base=fingerprint(adapter.model, ids_at(adapter.placement.tokens), reuse_unchanged=True),
    )
    files = {TENSORS: _tensor_file(peft.tensors), CONFIG: json_files.json_bytes(peft.config)}
    if tensors:
        files[LORAKIN_TENSORS] = _tensor_file(tensors)
    content = lorakin_part.with_checksums(content, files, peft.config)
    files[LORAKIN_JSON] = json_files.json_bytes(content)
    text = card.content(adapter, peft.config, notes or {}, home, converted=peft_format is None)
    if (readme := card.for_saving(path / card.CARD, text)) is not None:
        files[card.CARD] = readme
    # An adapter saved here earlier may have left this file behind.
    stale = [] if tensors else [LORAKIN_TENSORS]
    atomic.write(path, files, without=stale)
    return path


def _tensor_file(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(dict(tensors), metadata={"format": "pt"})


def read(path: Path) -> AdapterFiles:
    """Reads an adapter's directory, lorakin's or PEFT's; changes nothing.

    The files are those of one save, also while another save is under way.

    Raises:
        AdapterError: no directory, no config, no tensors, or files that are damaged.
    """
    if not path.is_dir():
        raise AdapterError(f"there is no adapter directory {path}")
    try:
        contents = atomic.read(path, (CONFIG, TENSORS, LORAKIN_JSON, LORAKIN_TENSORS))
        if TENSORS not in contents:
            contents = atomic.read(path, (CONFIG, OLD_TENSORS, LORAKIN_JSON, LORAKIN_TENSORS))
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error})") from None
    if CONFIG not in contents:
        raise no_json(path / CONFIG)
    config, tensors = parsed(path / CONFIG, contents[CONFIG]), _read_tensors(path, contents)
    return AdapterFiles(
        path, config, tensors, lorakin_part.read_lorakin_part(path, contents, tensors)
    )


def _read_tensors(path: Path, contents: Mapping[str, bytes]) -> dict[str, Tensor]:
    try:
        if TENSORS in contents:
            return lorakin_part.tensors_in(contents[TENSORS])
        if OLD_TENSORS in contents:
            return tensors_of(path / OLD_TENSORS, contents[OLD_TENSORS])
        raise AdapterError(f"{path} has no {TENSORS}")
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, OverflowError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: its tensors cannot be read ({error})") from None


__all__ = [
    "CONFIG",
    "LORAKIN_JSON",
    "LORAKIN_TENSORS",
    "OLD_TENSORS",
    "TENSORS",
    "AdapterFiles",
    "check_trained",
    "read",
    "save",
]
