"""One adapter on one module: its tensors there, and what they make of the module's input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.family import FrozenWeight, Method, Pair, Shape, Slot, Slots, widened
from lorakin.family.pair import ScaledPair
from lorakin.inject.attachments import BIAS, attachments_of
from lorakin.inject.layer_kinds import Layer, LinearLayer, kind_of
from lorakin.kernels.adapted_linear import CastPair, LinearChange
from lorakin.kernels.autograd import PLAIN, Copied, Version


def slot_trains(slot: Slot, tensor: Tensor) -> bool:
    """Whether the tensor trains: as its slot says, but not if empty (some optimizers fail then)."""
    return slot.trained and bool(tensor.numel())


class Branch(nn.Module):
    """One adapter on one module: its method's tensors there, as parameters."""

    def __init__(
        self,
        path: str,
        method: Method,
        layer: type[Layer],
        shape: Shape,
        parameters: Mapping[str, nn.Parameter],
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.method = method
        self.layer = layer
        self.shape = shape
        self.scale = 1.0
        self.siblings = path.rpartition(".")[0]
        self._begun: dict[str, Tensor] = {}
        self._squares: tuple[Version, Tensor] | None = None
        self._ready: tuple[Version, Copied, CastPair] | None = None
        for slot, parameter in parameters.items():
            self.register_parameter(slot, parameter)
        if bias is not None:  # in place of the base's
            self.register_parameter(BIAS, bias)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The parameters by slot, as the members named them."""
        return {slot: p for slot, p in self._parameters.items() if slot != BIAS and p is not None}

    def overwrite(self, tensors: Mapping[str, Tensor]) -> None:
        """Take other values, also of another rank.

        The parameters stay the same objects, so optimizers keep hold of them.
        """
        own = self.tensors()
        for slot in own.keys() - tensors.keys():
            delattr(self, slot)
        for slot, tensor in tensors.items():
            if slot not in own:
                device = next(iter(own.values())).device
                # Memory of torch's is aligned as always; otherwise the last bits of sums differ.
                own_memory = tensor.to(device, copy=True)
                self.register_parameter(slot, nn.Parameter(own_memory, requires_grad=False))
            elif own[slot].shape == tensor.shape:
                own[slot].copy_(tensor)
            else:
                was_empty = not own[slot].numel()
                own[slot].grad, own[slot].data = None, tensor.to(own[slot], copy=True)
                if was_empty or not tensor.numel():
                    own[slot].requires_grad_(slot_trains(self.slots()[slot], tensor))

    def remember_start(self) -> None:
        """Keep a sample of what trains, to tell later whether training reached it."""
        slots, tensors = self.slots(), self.tensors()
        trained = {slot: t for slot, t in tensors.items() if slots[slot].trained}
        self._begun = {
            slot: _sampled(t) for slot, t in trained.items() if slots[slot].belongs_to_pair
        }

    @property
    def is_at_start(self) -> bool:
        """Whether its pair is as it began.

        That is so if what starts at zero is zero; if nothing does, if no trained tensor has moved.
        """
        slots, tensors = self.slots(), self.tensors()
        zero = [
            t for slot, t in tensors.items() if slots[slot].trained and slots[slot].starts_at_zero
        ]
        if zero or not self._begun:
            return bool(zero) and not any(bool(t.any()) for t in zero)
        return all(torch.equal(_sampled(tensors[s]).to(t), t) for s, t in self._begun.items())

    def slots(self) -> Slots:
        """What the method declares about each tensor."""
        return self.method.slots_at(self.path, self.shape)

    def wide(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """The tensors in float32, those in float64 as they are, on `device`.

        A tensor that modules share may be on another device than the module, if the model was
        spread over several devices after it was adapted.
        """
        wide = widened(self.tensors())
        return wide if device is None else {slot: t.to(device) for slot, t in wide.items()}

    def pair(self, weight: Tensor | FrozenWeight, scale: float | None = None) -> Pair:
        """The method's pair over `weight` (outputs, inputs), in float32 or float64.

        Its change is multiplied by `scale`, by default the adapter's current scale.
        """
        pair = self.method.pair(self.wide(weight.device), self.shape, weight)
        return pair.times(self.scale if scale is None else scale)

    def rescale(self, scale: float) -> None:
        """Let the adapter change the module `scale` times as much as its tensors say."""
        self.scale, self._ready = scale, None

    def change(self, weight: Tensor, ready: bool = False) -> LinearChange:
        """What the adapter does to a linear layer of this weight (outputs, inputs).

        Args:
            weight: the base's.
            ready: whether the change is for inference: without gradients, in the dtype of `weight`.
        """
        tensors = self.wide()
        chain = self.method.chain(tensors)
        if chain is not None:
            return chain.times(self.scale)
        if any(tensor.device != weight.device for tensor in tensors.values()):
            tensors = self.wide(weight.device)
        if ready:
            return self._as_ready(tensors, weight)
        self._ready = None
        return self.scaled_pair(tensors, weight)

    def scaled_pair(self, tensors: Mapping[str, Tensor], matrix: Tensor) -> ScaledPair:
        """Returns the pair over a weight `matrix`, times the adapter's scale.

        A gain needs ‖w_j‖² of the weight's rows, which are kept as long as the weight does not
        change.
        """
        weight = FrozenWeight(matrix.detach())
        # A compiler cannot ask whether a tensor has changed.
        if not self.method.has_gain or torch.compiler.is_compiling():
            return self.method.scaled_pair(tensors, self.shape, weight).times(self.scale)

        is_known = self._squares is not None and self._squares[0].is_still(matrix)
        if self._squares is not None and is_known:
            weight.squares = self._squares[1]
        pair = self.method.scaled_pair(tensors, self.shape, weight)
        if not is_known and "squares" in vars(weight) and (seen := Version.of(matrix)):
            self._squares = seen, weight.squares
        return pair.times(self.scale)

    def _as_ready(self, tensors: Mapping[str, Tensor], matrix: Tensor) -> CastPair:
        """The pair as inference needs it.

        A gain costs a product with the base weight, so an adapter that does not train keeps it as
        long as nothing changes.
        """
        own = self.tensors().values()
        if (
            self._ready is not None
            and self._ready[0].is_still(matrix)
            and self._ready[1].is_still(*own)
        ):
            return self._ready[2]
        ready = CastPair.of(*self.scaled_pair(tensors, matrix), matrix.dtype)
        lasts = ready.gain_minus_one is not None and not any(tensor.requires_grad for tensor in own)
        seen, copied = (Version.of(matrix), Copied.of(*own)) if lasts else (None, None)
        self._ready = None if seen is None or copied is None else (seen, copied, ready)
        return ready

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_squares": None, "_ready": None}

    def current_kind(self, module: Any) -> type[Layer]:
        """The module's kind now: a plain one may have been quantised since it was adapted."""
        changed = self.layer is LinearLayer and type(module._parameters.get("weight")) not in PLAIN
        return (kind_of(module) or self.layer) if changed else self.layer

    def low_rank_term(self, module: Any, x: Tensor, pair: Pair) -> Tensor:
        """up(down x), without a gain, in the base's dtype."""
        dtype = self.current_kind(module).dtype(module, x)
        return self.layer.branch(module, x, Pair(pair.up.to(dtype), pair.down.to(dtype)))

    def forward(self, module: Any, x: Tensor, out: Tensor) -> Tensor:
        """What the adapter adds to the module's output `out`, in the base's dtype.

        That is (g−1)⊙(W0 x̃) + g⊙up(down x̃).
        """
        attached, layer = attachments_of(module), self.current_kind(module)
        dropped = layer.drop(x, self.method.dropout, self.training)
        pair = self.pair(layer.weight(module))
        change = self.low_rank_term(module, dropped, pair)
        if pair.gain is None:
            return change
        if dropped is x and not attached.merged:  # then W0 x is there already
            bias = getattr(module, "bias", None)
            product = out if bias is None else out - layer.per_output(bias, module)
        else:
            product = layer.product(
                module, dropped, attached.base.get("weight", module._parameters.get("weight"))
            )
        gain = layer.per_output(pair.gain, module)
        return (gain * change + (gain - 1) * product).to(change.dtype)


class Copy(nn.Module):
    """A copy of a whole module, which an adapter trains in place of the base's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _sampled(tensor: Tensor) -> Tensor:
    """About a thousand of its numbers, equally spaced."""
    return tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)].clone()


@contextlib.contextmanager
def brought(branches: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the adapters' tensors that Accelerate keeps elsewhere are here.

    Its hooks bring a module's tensors when the module is called. Adapters are not always called:
    the fused layer takes their tensors directly.
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
