"""An adapter independent of file format and model.

Codecs read a document from files or write one to files: `peft` for PEFT's, `lorakin_part` for
lorakin's, `foreign` for other libraries'. `match` fits a document to a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lorakin.family import Method
from lorakin.family.precision import wide_dtype
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.placement import Placement

Slots = Mapping[str, Tensor]
"""A module's tensors by slot, as its method names them: matrices and vectors."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One adapter: its method, the modules that it changes, and all of its tensors.

    A tensor that modules share is one object in all of them.
    """

    placement: Placement
    """The method, with the settings of each module; what is trained whole; rows; biases."""
    slots: Mapping[str, Slots] = dataclasses.field(default_factory=dict)
    """Path → slot → tensor of the adapted modules."""
    whole_modules: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    """Path → state of the modules that are trained whole (PEFT's `modules_to_save`)."""
    rows: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """Path → token rows (k, dim), in the order of the placement's ids."""
    biases: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """Path → the bias in place of the base's."""
    buffers: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """Name → a buffer of the base as training left it."""
    state: Mapping[str, Any] | None = None
    """What training remembers, for `restore_state`; None in files of other libraries."""
    resolved_method: Method | None = None
    """The method with the settings that a run decided; None if there was no run."""

    @classmethod
    def of(cls, adapter: InsertedAdapter) -> Document:
        """Returns the document of an adapter in a model, with the adapter's tensors, not copies."""
        placement = adapter.placement
        return cls(
            placement,
            slots={path: adapter.tensors.saved_tensors(path) for path in placement.methods},
            whole_modules={
                path: adapter.tensors.copy_of(path).state_dict() for path in placement.whole_modules
            },
            rows={path: adapter.tensors.rows_at(path).detach() for path in placement.tokens},
            biases=adapter.tensors.biases(),
            buffers=adapter.tensors.moved_buffers(),
            state=None if adapter.run.rules is None else adapter.run.state(),
            resolved_method=adapter.method,
        )

    @property
    def method(self) -> Method:
        """The method, without the settings of single modules."""
        return self.placement.method

    def copied(self) -> Document:
        """Returns a copy that shares no tensors with this one; tied biases stay one object."""
        biases = {id(bias): _copied(bias) for bias in self.biases.values()}
        return dataclasses.replace(
            self,
            slots={
                path: {slot: _copied(tensor) for slot, tensor in slots.items()}
                for path, slots in self.slots.items()
            },
            rows={path: _copied(rows) for path, rows in self.rows.items()},
            biases={path: biases[id(bias)] for path, bias in self.biases.items()},
        )

    def float32_copies(self) -> dict[str, dict[str, Tensor]]:
        """Returns copies of the modules' tensors for training, in float32 at least.

        Tensors that were one object still are.
        """
        copies = _float32_copies(t for slots in self.slots.values() for t in slots.values())
        return {
            path: {slot: copies[id(tensor)] for slot, tensor in slots.items()}
            for path, slots in self.slots.items()
        }

    def float32_biases(self) -> dict[str, Tensor]:
        """Returns copies of the biases for training, in float32 at least."""
        copies = _float32_copies(self.biases.values())
        return {path: copies[id(tensor)] for path, tensor in self.biases.items()}


def _float32_copies(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Returns copies in float32 at least, by the `id` of the original."""
    return {id(t): t.to(wide_dtype(t.dtype), copy=True) for t in tensors}


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
