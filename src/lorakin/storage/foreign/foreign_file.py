"""What every foreign format needs: the file's tensors, matched with modules of the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError, some
from lorakin.family import Shape, all_finite
from lorakin.inject import layer_kinds
from lorakin.storage.schema import Finite, SchemaError, checked

CONFIG = "adapter_config.json"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What another library's file says about a model."""

    format: str
    """The library."""
    slots: dict[str, dict[str, Tensor]]
    """Path → `A` (r, inputs), `B` (outputs, r) and perhaps `m` (outputs,), in the file's dtype."""
    scales: dict[str, float]
    """Path → s of the change s·B·A."""
    notes: list[str]
    """What the user should know."""


@dataclasses.dataclass(frozen=True)
class ForeignFile:
    """A file of another library, and the model that it is for."""

    where: str
    """The file, for messages."""
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    """The config beside it; empty if there is none."""
    model: nn.Module
    modules: Mapping[str, nn.Module]
    alpha: float | None
    """The user's alpha."""

    def error(self, message: str) -> AdapterError:
        """An error about the file."""
        return AdapterError(f"{self.where}: {message}")

    def split(self, endings: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
        """The tensors by path and slot.

        `endings`: ending of a key → slot; the first two are those of A and B.
        """
        slots: dict[str, dict[str, Tensor]] = {}
        rest = []
        for key, tensor in self.tensors.items():
            ending = next((ending for ending in endings if key.endswith(f".{ending}")), None)
            if ending is None:
                rest.append(key)
            else:
                slots.setdefault(key.removesuffix(f".{ending}"), {})[endings[ending]] = tensor
        if rest:
            raise self.error(
                f"tensors that belong to nothing: {some(rest)}; the file is damaged or of another "
                "kind"
            )
        for path, own in slots.items():
            if absent := [ending for ending in list(endings)[:2] if endings[ending] not in own]:
                raise self.error(
                    f"{path} lacks {', '.join(absent)}; the file is damaged or incomplete"
                )
            if flat := [slot for slot in ("A", "B") if own[slot].ndim < 2]:
                shape = tuple(own[flat[0]].shape)
                raise self.error(f"{flat[0]} of {path} has shape {shape}, expected a matrix")
        return slots

    def module(self, path: str) -> tuple[nn.Module, Shape]:
        """The module at `path`, and the shape of its weight as a matrix."""
        if path not in self.modules:
            raise self.error(
                f"it is for another base model: it adapts {path}, which this "
                f"{type(self.model).__name__} does not have"
            )
        module = self.modules[path]
        if reason := layer_kinds.refusal(module):
            raise self.error(f"it adapts {path}, but that is {reason}")
        kind = layer_kinds.kind_of(module)
        assert kind is not None
        return module, kind.shape(module)

    def checked(self, path: str, slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The slots, if they are a change of the weight at `path`: finite, dense, of its shape."""
        _, shape = self.module(path)
        for slot, tensor in slots.items():
            if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
                raise self.error(
                    f"{slot} of {path} is {tensor.dtype} ({tensor.layout}), expected a dense "
                    "floating tensor"
                )
            if not all_finite(tensor):
                raise self.error(f"{slot} of {path} holds NaN or infinity")
        if not _fits(slots, shape):
            have = ", ".join(f"{slot} {tuple(t.shape)}" for slot, t in slots.items())
            raise self.error(
                f"{path} has {have}, as outputs × inputs, but its weight in this "
                f"{type(self.model).__name__} is {shape.outputs} × {shape.inputs}; the file is for "
                "another base model, or damaged"
            )
        return {slot: slots[slot].contiguous() for slot in ("A", "B", "m") if slot in slots}

    def scale(self, path: str, rank: int, said: Iterable[float]) -> float:
        """The scale s of the module at `path`.

        `said` are the scales that the file may mean; the user's alpha decides between them, or
        stands in if there is none.
        """
        known = sorted(set(said))
        if self.alpha is None:
            if len(known) == 1:
                return known[0]
            if not known:
                raise self.error(
                    "nothing here says alpha; give alpha=… as it was in training. The rank of "
                    f"{path} is {rank}, and the change is alpha / rank · B·A"
                )
            either = " or ".join(f"alpha={s * rank:g}, a scale of {s:g}" for s in known)
            raise self.error(f"what it says can mean two scales; give {either}")
        given = self.alpha / rank
        if known and not any(math.isclose(given, s, rel_tol=1e-6) for s in known):
            said_alpha = " or ".join(f"{s * rank:g}" for s in known)
            raise self.error(
                f"alpha={self.alpha:g} was given, but for {path} of rank {rank} the file says "
                f"{said_alpha}; leave alpha out"
            )
        return given

    def number(self, holder: Mapping[str, Any], name: str) -> float:
        """A number of the config."""
        return self.said(Finite, holder, name)  # type: ignore[no-any-return]

    def said(self, kind: Any, holder: Mapping[str, Any], name: str) -> Any:
        """A field of the config, of this type (see `schema.fitted`)."""
        try:
            return checked(kind, holder[name], name)
        except SchemaError as error:
            raise self.error(f"in its {CONFIG}, {error}") from None

    def tied(self, path: str) -> list[str]:
        """The other modules with the weight of the module at `path`."""
        weight = self.modules[path].weight
        return [
            other
            for other, module in self.modules.items()
            if other != path and getattr(module, "weight", None) is weight
        ]


def _fits(slots: Mapping[str, Tensor], shape: Shape) -> bool:
    """Whether the slots are a pair, and perhaps a magnitude, of this shape."""
    A, B, m = slots["A"], slots["B"], slots.get("m")
    if not A.ndim == B.ndim == 2 or not B.shape[1] == len(A) > 0:
        return False
    return (len(B), A.shape[1]) == shape[:2] and (m is None or tuple(m.shape) == shape[:1])
