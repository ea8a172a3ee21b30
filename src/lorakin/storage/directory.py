"""An adapter's directory: PEFT's two files, beside them lorakin's own part, and a model card."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lorakin.errors import AdapterError, LorakinWarning, StateError, some
from lorakin.family.pair import is_sharded
from lorakin.inject.adapted import module_at
from lorakin.inject.biases import bias_of
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.tokens import base_rows, ids_at
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
        """Raise `AdapterError` if `lorakin.json`, or the config beside it, is not as written.

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
    """Write the adapter into the directory `path`, made if need be: all of its files or none.

    Among them is a model card, README.md, unless a person's is there. `notes` and `home` are for
    it: see `card.content`.

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
    # Of an adapter that was there before, which may have had tensors of our own.
    without = [] if tensors else [OWN_TENSORS]
    atomic.write(path, files, without=without)
    return path


def _tensor_file(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(dict(tensors), metadata={"format": "pt"})


def read(path: Path) -> Files:
    """Read an adapter's directory, lorakin's or PEFT's; changes nothing.

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


def check_trained(adapter: InsertedAdapter) -> None:
    """See that the adapter is what it says: refuse one whose member never did its work, say what training never reached.

    Raises:
        StateError: a member that acts at optimizer steps never saw one.
    """
    acting = [member.word for member in adapter.method.members if member.acts_at_steps]
    if acting and adapter.is_fresh and not adapter.run.steps:
        raise StateError(
            f"adapter {adapter.name!r} is not saved: {', '.join(acting)} acts at optimizer steps and never saw one, so this is "
            "not what it says. Train with a torch optimizer that holds the adapter's tensors, such as adapter.optimizer(…)"
        )
    unfinished = [
        reason for rule in adapter.run.rules or () if (reason := rule.check(adapter.run.steps))
    ]
    for reason in (*unfinished, *adapter.method.unmoved(adapter.run.adapted_modules())):
        warnings.warn(f"adapter {adapter.name!r}: {reason}", LorakinWarning, stacklevel=3)
    if adapter.merging.scale != 1:
        warnings.warn(
            f"files hold no scale: adapter {adapter.name!r} is saved as it is at scale 1, and not at {adapter.merging.scale:g}; for files "
            "of the scaled change, save what lorakin.as_lora makes of it",
            LorakinWarning,
            stacklevel=3,
        )
    if moved := sorted(adapter.tensors.moved_buffers()):
        warnings.warn(
            f"training moved buffers of the base ({some(moved)}); they are saved beside adapter {adapter.name!r}, in a file that "
            "lorakin reads and PEFT does not. For PEFT, train what owns them whole, with modules_to_save",
            LorakinWarning,
            stacklevel=3,
        )
    whole = [
        path
        for path in adapter.placement.copies
        if adapter.is_fresh and adapter.run.steps and _is_the_bases(adapter, path)
    ]
    if whole:
        warnings.warn(
            f"adapter {adapter.name!r} trains {', '.join(whole)} whole, but it is exactly the base's: training never reached it",
            LorakinWarning,
            stacklevel=3,
        )
    for path, rows in base_rows(
        adapter.model, adapter.placement.tokens if adapter.is_fresh and adapter.run.steps else {}
    ).items():
        same = (adapter.tensors.rows_at(path).to(rows) == rows).all(1).tolist()
        if still := [
            str(n)
            for n, unmoved in zip(adapter.placement.tokens[path].ids, same, strict=True)
            if unmoved
        ]:
            warnings.warn(
                f"adapter {adapter.name!r} trains rows of {path} that are exactly the base's: training never met the tokens "
                f"{some(still)}",
                LorakinWarning,
                stacklevel=3,
            )
    own = adapter.tensors.biases()
    if (
        adapter.is_fresh
        and adapter.run.steps
        and own
        and all(_is_the_bases_bias(adapter, path, bias) for path, bias in own.items())
    ):
        warnings.warn(
            f"adapter {adapter.name!r} trains {some(f'the bias of {path}' for path in own)}, but each is exactly the base's: "
            "training never reached them",
            LorakinWarning,
            stacklevel=3,
        )
    reached = [
        p
        for p in adapter.run.adapted_modules()
        if not any(rule.gave_up(p) for rule in adapter.run.rules or ())
    ]
    still = [place.path for place in reached if _changes_nothing(adapter, place.path)]
    if still:
        share = (
            "every module"
            if len(still) == len(adapter.placement.methods)
            else f"{len(still)} of {len(adapter.placement.methods)} modules"
        )
        warnings.warn(
            f"adapter {adapter.name!r} changes nothing in {share} ({still[0]}, …): the change is exactly zero there, so "
            "training never reached it",
            LorakinWarning,
            stacklevel=3,
        )


def _is_the_bases(adapter: InsertedAdapter, path: str) -> bool:
    base = module_at(adapter.model, path).state_dict()
    return all(
        torch.equal(tensor, base[key].to(tensor))
        for key, tensor in adapter.tensors.copy_of(path).state_dict().items()
    )


def _is_the_bases_bias(adapter: InsertedAdapter, path: str, bias: Tensor) -> bool:
    base = bias_of(module_at(adapter.model, path))
    if base is None or base.is_meta or is_sharded(base):  # of one that is elsewhere nobody can tell
        return False
    return torch.equal(bias, base.to(bias))


def _changes_nothing(adapter: InsertedAdapter, path: str) -> bool:
    site = adapter.tensors.branch(path)
    if not any(slot.trained for slot in site.slots().values()):
        return False  # meant to
    bias = adapter.tensors.biases().get(path)
    if bias is not None and not _is_the_bases_bias(adapter, path, bias):
        return False
    there = site.tensors().values()
    has_numbers = not any(t.is_meta for t in there) and all(t.numel() for t in there if t.dim() > 1)
    return has_numbers and site.is_at_start


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
