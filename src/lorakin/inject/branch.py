"""One adapter on one module: its parameters there, and what they add to the module's output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.family import Chain, FrozenWeight, Method, Pair, Shape, Slot, Slots, widened
from lorakin.family.pair import ScaledPair
from lorakin.inject.attachments import BIAS, attachments_of
from lorakin.inject.cast_tensors import CastTensors
from lorakin.inject.layer_kinds import LayerKind, LinearLayer, QuantisedLayer, kind_of
from lorakin.kernels.adapted_linear import CastPair, LinearChange
from lorakin.kernels.autograd import PLAIN_TYPES, Copied, Version, is_capturing
from lorakin.kernels.weight_source import Weight, tensor_of


def slot_trains(slot: Slot, tensor: Tensor) -> bool:
    """Returns whether the tensor trains: as its slot says, but not if it is empty.

    Some optimizers fail on empty tensors.
    """
    return slot.trained and bool(tensor.numel())


def _slots_to_cast(slots: Slots) -> tuple[str, ...]:
    """Returns the slots whose tensors are multiplied in the base's dtype.

    A gain stays in float32: it is near 1, where narrow dtypes have few digits. What all modules
    share and none trains is cast once for all (`FrozenMatrixCache`).
    """
    return tuple(
        name
        for name, slot in slots.items()
        if slot.belongs_to_pair and (slot.trained or not slot.shared)
    )


class Branch(nn.Module):
    """One adapter on one module: its method's tensors there, as parameters.

    This is what PEFT's `LoraLayer` is for one adapter; but it hangs beside the module, which stays.
    """

    def __init__(
        self,
        path: str,
        method: Method,
        kind: type[LayerKind],
        shape: Shape,
        parameters: Mapping[str, nn.Parameter],
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.method = method
        self.kind = kind
        self.shape = shape
        self.scale = 1.0
        self.group = path.rpartition(".")[0]
        """Modules with one parent may share products; see `kernels.linear_with_chain`."""
        self.cast = CastTensors()
        self._cast_slots = (
            _slots_to_cast(method.slots_at(path, shape))
            if kind in (LinearLayer, QuantisedLayer)
            else ()
        )
        self._start_sample: dict[str, Tensor] = {}
        self._squares: tuple[Version, Tensor] | None = None
        self._kept_pair: tuple[Version, Copied | Version, CastPair] | None = None
        for slot, parameter in parameters.items():
            self.register_parameter(slot, parameter)
        if bias is not None:
            # a forward gets it in place of the base's
            self.register_parameter(BIAS, bias)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Returns the parameters by slot, as the members named them."""
        return {slot: p for slot, p in self._parameters.items() if slot != BIAS and p is not None}

    def overwrite(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites the parameters with other values, also of another rank.

        The parameters stay the same objects, so optimizers keep hold of them.
        """
        parameters = self.tensors()
        for slot in parameters.keys() - tensors.keys():
            delattr(self, slot)
        for slot, tensor in tensors.items():
            parameter = parameters.get(slot)
            if parameter is None:
                device = next(iter(parameters.values())).device
                # A tensor read from a file may be unaligned, and sums would differ in their last
                # bits: copy it.
                copied = tensor.to(device, copy=True)
                self.register_parameter(slot, nn.Parameter(copied, requires_grad=False))
            elif parameter.shape == tensor.shape:
                parameter.copy_(tensor)
            else:
                was_empty = not parameter.numel()
                parameter.grad, parameter.data = None, tensor.to(parameter, copy=True)
                if was_empty or not tensor.numel():
                    parameter.requires_grad_(slot_trains(self.slots()[slot], tensor))

    def remember_start(self) -> None:
        """Keeps a sample of what trains, to tell later whether training reached it."""
        slots, tensors = self.slots(), self.tensors()
        trained = {slot: t for slot, t in tensors.items() if slots[slot].trained}
        self._start_sample = {
            slot: _sampled(t) for slot, t in trained.items() if slots[slot].belongs_to_pair
        }

    @property
    def is_at_start(self) -> bool:
        """Whether its pair is as at its start.

        It is if the tensors that start at zero are zero, or, if none starts so, if no trained
        tensor has moved.
        """
        slots, tensors = self.slots(), self.tensors()
        zero = [
            t for slot, t in tensors.items() if slots[slot].trained and slots[slot].starts_at_zero
        ]
        if zero or not self._start_sample:
            return bool(zero) and not any(bool(t.any()) for t in zero)
        return all(
            torch.equal(_sampled(tensors[s]).to(t), t) for s, t in self._start_sample.items()
        )

    def slots(self) -> Slots:
        """Returns what the method declares about each tensor."""
        return self.method.slots_at(self.path, self.shape)

    def float32_tensors(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """Returns the tensors in float32, those in float64 as they are, on `device`.

        A tensor that modules share may be on another device than the module, if the model was
        spread over several devices after it was adapted.
        """
        tensors = widened(self.tensors())
        return tensors if device is None else {slot: t.to(device) for slot, t in tensors.items()}

    def tensors_to_cast(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the tensors that a product in `dtype` needs cast, by slot."""
        tensors = ((slot, self._parameters.get(slot)) for slot in self._cast_slots)
        return {slot: t for slot, t in tensors if t is not None and t.dtype != dtype}

    def pair(self, weight: Tensor | FrozenWeight, scale: float | None = None) -> Pair:
        """Returns the method's pair over `weight` (outputs, inputs), in float32 or float64.

        Its change is multiplied by `scale`, by default the adapter's current scale.
        """
        pair = self.method.pair(self.float32_tensors(weight.device), self.shape, weight)
        return pair.times(self.scale if scale is None else scale)

    def rescale(self, scale: float) -> None:
        """Multiplies the adapter's change of the module by `scale` from now on."""
        self.scale, self._kept_pair = scale, None

    def change(self, weight: Weight, for_inference: bool = False) -> LinearChange:
        """Returns what the adapter does to a linear layer of this weight (outputs, inputs).

        Args:
            weight: the base's.
            for_inference: whether no gradients are needed; the change has the dtype of `weight`.
        """
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        # A graph that read the kept pair would go on reading it when the adapter has other values.
        may_keep = for_inference and not is_capturing()
        if may_keep and (kept := self._pair_kept_over(weight)) is not None:
            return kept

        self._kept_pair = None
        tensors = self.cast.take(self, dtype)
        if any(t.device != weight.device for s, t in tensors.items() if s in self._cast_slots):
            tensors = {slot: t.to(weight.device) for slot, t in tensors.items()}
        matrix = self._frozen(weight)
        change = self.method.linear_change(tensors, self.shape, matrix).times(self.scale)
        self._keep_squares(weight, matrix)
        if isinstance(change, Chain) or not for_inference:
            return change
        pair = CastPair.of(*change, weight.dtype)
        if may_keep:
            self._keep_pair(weight, pair)
        return pair

    def scaled_pair(self, tensors: Mapping[str, Tensor], weight: Tensor) -> ScaledPair:
        """Returns the pair over `weight` (outputs, inputs), multiplied by the adapter's scale."""
        matrix = self._frozen(weight)
        pair = self.method.scaled_pair(tensors, self.shape, matrix).times(self.scale)
        self._keep_squares(weight, matrix)
        return pair

    # A gain (DoRA) reads the squares ‖w_j‖² of the weight's rows, and costs a product with the
    # weight. They are kept as long as nothing changes. A compiler cannot ask whether it has.

    def _frozen(self, weight: Weight) -> FrozenWeight:
        """Returns the weight for members, with the squares of its rows if they are kept."""
        if not isinstance(weight, Tensor):
            return weight
        matrix = FrozenWeight(weight.detach())
        if self._squares is not None and not torch.compiler.is_compiling():
            version, squares = self._squares
            if version.is_still(weight):
                matrix.squares = squares
        return matrix

    def _keep_squares(self, weight: Weight, matrix: FrozenWeight) -> None:
        if matrix is weight or "squares" not in vars(matrix) or torch.compiler.is_compiling():
            return
        if self._squares is None or self._squares[1] is not matrix.squares:
            version = Version.of(tensor_of(weight))
            self._squares = None if version is None else (version, matrix.squares)

    def _pair_kept_over(self, weight: Weight) -> CastPair | None:
        """Returns the pair that inference keeps, if nothing has changed since."""
        if self._kept_pair is None:
            return None
        version, of_adapter, pair = self._kept_pair
        if not version.is_still(tensor_of(weight)):
            return None
        return pair if of_adapter.is_still(*self.tensors().values()) else None

    def _keep_pair(self, weight: Weight, pair: CastPair) -> None:
        """Keeps the pair of an adapter that does not train."""
        parameters = self.tensors().values()
        if pair.gain_minus_one is None or any(p.requires_grad for p in parameters):
            return
        version = Version.of(tensor_of(weight))
        # A GPU would have to be waited for to compare values.
        of_adapter = Copied.of(*parameters) or Version.of(*parameters)
        if version is not None and of_adapter is not None:
            self._kept_pair = version, of_adapter, pair

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_squares": None, "_kept_pair": None}

    def current_kind(self, module: Any) -> type[LayerKind]:
        """Returns the module's kind now: a plain one may have been quantised after adapting."""
        is_plain = type(module._parameters.get("weight")) in PLAIN_TYPES
        if self.kind is not LinearLayer or is_plain:
            return self.kind
        return kind_of(module) or self.kind

    def low_rank_term(self, module: Any, x: Tensor, pair: Pair) -> Tensor:
        """Returns up(down x), without a gain, in the base's dtype."""
        dtype = self.current_kind(module).dtype(module, x)
        return self.kind.low_rank_product(module, x, Pair(pair.up.to(dtype), pair.down.to(dtype)))

    def _chain_of(self, module: Any) -> Chain | None:
        """Returns the change of an nn.Linear if it is a `Chain`, cut to the weight's size."""
        if self.current_kind(module) is not LinearLayer or not self.method.keeps_form:
            return None
        tensors = self.float32_tensors(module.weight.device)
        change = self.method.parametrisation.change(tensors)
        return change.cut_to(self.shape).times(self.scale) if isinstance(change, Chain) else None

    def forward(self, module: Any, x: Tensor, out: Tensor) -> Tensor:
        """Returns what the adapter adds to the module's output `out`, in the base's dtype.

        That is (g−1)⊙(W0 x̃) + g⊙up(down x̃).
        """
        attached, kind = attachments_of(module), self.current_kind(module)
        dropped = kind.dropout(x, self.method.dropout, self.training)
        if torch.compiler.is_compiling() and (chain := self._chain_of(module)) is not None:
            # A pair would have gradients as large as the frozen matrices.
            return chain.applied_to(dropped, kind.dtype(module, x))
        pair = self.pair(kind.weight(module))
        change = self.low_rank_term(module, dropped, pair)
        if pair.gain is None:
            return change
        if dropped is x and not attached.merged:
            # `out` is W0 x + b already
            bias = getattr(module, "bias", None)
            product = out if bias is None else out - kind.per_output(bias, module)
        else:
            weight = attached.base_before_merge.get("weight", module._parameters.get("weight"))
            product = kind.base_product(module, dropped, weight)
        gain = kind.per_output(pair.gain, module)
        return (gain * change + (gain - 1) * product).to(change.dtype)


class Copy(nn.Module):
    """A copy of a whole module, which an adapter trains in place of the base's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _sampled(tensor: Tensor) -> Tensor:
    """Returns about a thousand of its values, equally spaced."""
    return tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)].clone()


@contextlib.contextmanager
def offloaded_tensors_loaded(branches: Sequence[nn.Module]) -> Iterator[None]:
    """Loads the adapters' tensors that Accelerate has offloaded, inside a `with` block.

    Its hooks load a module's tensors when the module is called. Adapters are not always called: the
    fused layer takes their tensors directly.
    """
    hooked = [
        (branch, vars(branch)["_hf_hook"]) for branch in branches if "_hf_hook" in vars(branch)
    ]
    for branch, hook in hooked:
        hook.pre_forward(branch)
    try:
        yield
    finally:
        for branch, hook in hooked:
            hook.post_forward(branch, None)
