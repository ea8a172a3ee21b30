"""An adapted module as a member's rule sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorakin.errors import StateError
from lorakin.family import FrozenWeight, Method, Shape
from lorakin.inject.adapted import add_to_weight_copy, exchange_moved_weight, module_at
from lorakin.inject.attachments import attachments_of
from lorakin.inject.layer_kinds import unadapted

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter


class PlacedModule:
    """An adapted module as a member's rule sees it.

    It looks its tensors up each time, because sharding a model exchanges its parameters.
    """

    def __init__(self, adapter: InsertedAdapter, path: str) -> None:
        self.adapter = adapter
        self.path = path

    @property
    def shape(self) -> Shape:
        """The shape of the module's weight."""
        return self.adapter.tensors.branch(self.path).shape

    @property
    def method(self) -> Method:
        """The method, with the module's own rank and alpha."""
        return self.adapter.placement.methods[self.path]

    @property
    def weight(self) -> Tensor | FrozenWeight:
        """Its base weight as a matrix (outputs, inputs), even while adapters are merged."""
        return unadapted(module_at(self.adapter.model, self.path)).weight

    def tensors(self) -> dict[str, nn.Parameter]:
        """Returns its tensors by slot."""
        return self.adapter.tensors.branch(self.path).tensors()

    def trains(self, slot: str) -> bool:
        """Returns whether the method trains the tensor of this slot."""
        return self.adapter.tensors.branch(self.path).slots()[slot].trained

    def put(self, slot: str, tensor: Tensor) -> None:
        """Adds a tensor to the module, which does not train."""
        parameter = (
            tensor
            if isinstance(tensor, nn.Parameter)
            else nn.Parameter(tensor, requires_grad=False)
        )
        self.adapter.tensors.branch(self.path).register_parameter(slot, parameter)

    def take(self, slot: str) -> Tensor:
        """Removes such a tensor from the module, and returns it."""
        tensor = self.tensors()[slot].detach()
        delattr(self.adapter.tensors.branch(self.path), slot)
        return tensor

    def move_base(self, change: Tensor) -> None:
        """Adds `change` (outputs, inputs) to a copy of the base weight, and uses the copy."""
        if self.adapter.effect.scale != 1:
            raise StateError(
                f"adapter {self.adapter.name!r} moves the base weights in place, which its scale "
                f"of {self.adapter.effect.scale:g} does not reach; set it to 1 while training"
            )
        add_to_weight_copy(module_at(self.adapter.model, self.path), change)

    def restore_base(self) -> None:
        """Puts the base weight back, if it was moved."""
        module: Any = module_at(self.adapter.model, self.path)
        exchange_moved_weight(module)
        attachments_of(module).base_before_move = {}
