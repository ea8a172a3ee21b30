"""Counts what code takes without running it: bytes alive, arithmetic, and bytes moved.

`Traced` watches every operation on tensors. Under `FakeTensorMode` tensors have shapes, dtypes and
devices but no data, so the real model, loss, backward and optimizer run in little memory at any
size. Each storage counts once, from when it is made until nothing holds it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lorakin.plan.machine import Machine

aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default
LARGE_TENSOR = 32 << 20
"""glibc's malloc maps blocks of this size and more on their own, and returns them to the system."""
EMPTY = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}
"""Operations that make a tensor without writing it."""


class Peak(NamedTuple):
    """The bytes that are alive at one moment.

    Attributes:
        total: all bytes.
        kinds: bytes by what they are.
        small_tensor_bytes: the bytes in storages smaller than `LARGE_TENSOR`.
    """

    total: int
    kinds: dict[str, int]
    small_tensor_bytes: int


@dataclasses.dataclass
class StoredBytes:
    """A storage that is alive: its size in bytes and what it is."""

    reference: weakref.ref[Any]
    size: int
    kind: str


class Traced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what the operations inside its context take. Enter it inside `FakeTensorMode`.

    Some code asks for values, by `bool(tensor)` or `.item()`. It gets those of a healthy run:
    everything is finite, `any` finds nothing, `all` holds, compared tensors are equal, and
    `nonzero` finds everything.

    Attributes:
        machine: how fast operations run.
        real: whether tensors have data, so that every question has a real answer.
        alive: kind → bytes (see `phase`).
        small_tensor_bytes: the bytes alive in storages smaller than `LARGE_TENSOR`.
        peaks: phase → the moment when most bytes were alive.
        seconds: phase → what its operations would take.
    """

    def __init__(self, machine: Machine, real: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.machine = machine
        self.real = real
        self.alive: collections.Counter[str] = collections.Counter()
        self.small_tensor_bytes = 0
        self.peaks: dict[str, Peak] = {}
        self.seconds: collections.Counter[str] = collections.Counter()
        self._storages: dict[int, StoredBytes] = {}
        self._phase, self._kind, self._total = "", "temporary", 0

    @contextlib.contextmanager
    def phase(self, name: str, makes: str) -> Iterator[None]:
        """Counts peak and seconds for phase `name`, and new storages as kind `makes`."""
        before, self._phase, self._kind = (self._phase, self._kind), name, makes
        self._note()
        try:
            yield
        finally:
            self._phase, self._kind = before

    def see(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Counts tensors that were made before."""
        with self.phase(self._phase, makes=kind):
            for tensor in tensors:
                self._see(tensor)

    def continue_as(self, name: str) -> None:
        """Counts the rest of the present phase for another one."""
        self._phase = name
        self._note()

    def become(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Counts these tensors' storages as `kind` from now on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._storages:
                stored = self._storages[key]
                self.alive[stored.kind] -= stored.size
                self.alive[kind] += stored.size
                stored.kind = kind

    def all_become(self, kind: str, was: str) -> None:
        """Counts all storages of kind `was` as `kind` from now on."""
        for stored in self._storages.values():
            if stored.kind == was:
                stored.kind = kind
        self.alive[kind] += self.alive.pop(was, 0)

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is DEVICE:  # this is called more often than everything else together
            return function(*args)
        if not self.real:
            if function is aten._local_scalar_dense.default:
                return _healthy(args[0])
            if function in (aten.equal.default, aten.allclose.default):
                return True
            if function is aten.nonzero.default:
                # The shape of its result depends on the data. At most, it finds every element.
                everything = (args[0].numel(), args[0].ndim)
                function, args, kwargs = (
                    aten.new_empty.default,
                    (args[0], everything),
                    {"dtype": torch.int64},
                )
        out = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in (aten.any, aten.all) and not self.real:
            out._healthy = packet is aten.all
        are_new = [self._see(tensor) for tensor in _tensors(out)]
        if not function.is_view:
            flops = _flops(packet, args, kwargs or {}, out)
            writes = packet not in EMPTY and (any(are_new) or function._schema.is_mutable)
            moved = _bytes(args) + _bytes(out) if writes else 0
            self.seconds[self._phase] += self.machine.seconds(flops, moved)  # type: ignore[assignment]
        return out

    def _see(self, tensor: Tensor) -> bool:
        """Counts the tensor's storage; returns whether it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return False
        size = storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._gone(key))
        self._storages[key] = StoredBytes(reference, size, self._kind)
        self.small_tensor_bytes += size if size < LARGE_TENSOR else 0
        self.alive[self._kind] += size
        self._total += size
        self._note()
        return True

    def _gone(self, key: int) -> None:
        stored = self._storages.pop(key)
        self.alive[stored.kind] -= stored.size
        self._total -= stored.size
        self.small_tensor_bytes -= stored.size if stored.size < LARGE_TENSOR else 0

    def _note(self) -> None:
        peak = self.peaks.get(self._phase)
        if peak is None or self._total >= peak.total:
            self.peaks[self._phase] = Peak(self._total, dict(self.alive), self.small_tensor_bytes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _healthy(tensor: Any) -> bool | int | float:
    """Returns the number that a healthy run would have here."""
    constant = getattr(tensor, "constant", None)
    if constant is not None:
        return constant.item()  # type: ignore[no-any-return]
    if tensor.dtype == torch.bool:
        return bool(getattr(tensor, "_healthy", True))
    return 1.0 if tensor.dtype.is_floating_point else 1


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Returns the multiplications and additions of a product, a convolution or attention."""
    if packet in ATTENTION:
        skipped, products = ATTENTION[packet]
        query, key = args[skipped : skipped + 2]
        return products * 2 * math.prod(query.shape) * key.shape[-2]  # type: ignore[no-any-return]
    return (
        int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0
    )


ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 5),
}
"""Operations that torch's table lacks: how many arguments come before the query, and how many
matrix products it has."""
