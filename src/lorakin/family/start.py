"""What the starts share: members that say where a pair begins, and leave its form as it is.

A start that is not zero would change the model before training. The papers subtract it from the
base weight. Here the base stays as it is, and a frozen anchor beside the pair takes the start away:

    W = W0 + up·down − up_0·down_0 = W0 + (up − up_0)·down + up_0·(down − down_0)

The anchor up_0, down_0 is the pair at the start. In the second form both terms are zero then, to
the bit. So training begins exactly at the base, merging gives plain weights, and files hold a plain
pair of rank 2r. If `down` never trains, one pair of rank r holds both terms: (up − up_0)·down.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lorakin.family.change import LowRank
from lorakin.family.measure import UnadaptedModule
from lorakin.family.member import Modifier, Parametrisation
from lorakin.family.pair import Pair, Shape, Tensors
from lorakin.family.settings import require
from lorakin.family.slots import Slot, Slots, factors_of
from lorakin.family.weight import has_no_values

if TYPE_CHECKING:
    from lorakin.family.method import Method

ANCHOR_UP, ANCHOR_DOWN = "up_0", "down_0"


@dataclass(frozen=True, kw_only=True)
class Start(Modifier):
    """A member that says where each module's pair begins."""

    in_probe: ClassVar[bool] = False
    peft_start: ClassVar[str] = ""
    """PEFT's word for it in `init_lora_weights`, if PEFT has it."""

    def check(self, shape: Shape, path: str, method: Method) -> None:
        require(
            not shape.lookup,
            f"{self.word} works on layers that multiply by their weight, but {path} is an "
            "embedding; exclude it",
        )


@dataclass(frozen=True, kw_only=True)
class AnchoredStart(Start):
    """A start that is not zero, and its anchor. Subclasses return the initial B and A."""

    slots: ClassVar[Slots] = {
        ANCHOR_UP: Slot(("outputs", "rank"), trained=False),
        ANCHOR_DOWN: Slot(("rank", "inputs"), trained=False),
    }

    @abstractmethod
    def initial_factors(
        self, module: UnadaptedModule, rank: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the initial B (outputs, rank) and A (rank, inputs) of one module.

        The pair's change is scale·B·A.
        """

    def refusal_of_pair(self, pair_class: type[Parametrisation]) -> str | None:
        if factors_of(pair_class.slots) is None:
            return f"{self.word} needs a plain product B·A, which {pair_class.word} is not"
        return None

    def amend_slots(self, slots: Slots, path: str, shape: Shape) -> Slots:
        nonzero = {name: replace(slot, starts_at_zero=False) for name, slot in slots.items()}
        return {**nonzero, **self.slots}

    def amend_start(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        return {
            path: self._with_anchor(path, of_module, modules[path], methods[path])
            for path, of_module in tensors.items()
        }

    def _with_anchor(
        self, path: str, tensors: Tensors, module: UnadaptedModule, method: Method
    ) -> Tensors:
        """Returns one module's tensors: the pair at its start, and its anchor."""
        pair, shape = method.parametrisation, module.shape
        names, change = factors_of(pair.slots_at(shape)), pair.change(tensors)
        assert names is not None
        assert isinstance(change, LowRank)

        initial = dict(tensors)
        if not has_no_values(change.up) and not has_no_values(module.weight):
            factors = self.initial_factors(module, len(change.down), change.scale)
            for name, factor in zip(names, factors, strict=True):
                initial[name] = factor.to(tensors[name]).contiguous()

        start = pair.change(initial).pair(shape)
        anchor = {ANCHOR_UP: start.up.clone()}
        if method.slots_at(path, shape)[names[1]].trained:
            anchor[ANCHOR_DOWN] = start.down.clone()
        return initial | anchor

    def beside_pair(self, pair: Pair, tensors: Mapping[str, Tensor]) -> Pair:
        up_0 = tensors[ANCHOR_UP]
        if ANCHOR_DOWN not in tensors:  # down never trains, so one pair holds both terms
            return pair._replace(up=pair.up - up_0)

        down_0 = tensors[ANCHOR_DOWN]
        if pair.up.shape != up_0.shape:  # another member has made the pair longer
            up, down = torch.cat([pair.up, -up_0], 1), torch.cat([pair.down, down_0], 0)
        else:
            up = torch.cat([pair.up - up_0, up_0], 1)
            down = torch.cat([pair.down, pair.down - down_0], 0)
        return pair._replace(up=up, down=down)
