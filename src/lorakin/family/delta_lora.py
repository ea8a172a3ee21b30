"""Delta-LoRA: after K steps the base weight moves too, with every step of the low-rank product.

Paper:    "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices", arXiv 2309.02411.
Rule:     for every optimizer step n > K        W_n = W_{n−1} + λ · (P_n − P_{n−1}),      P_n = s · B_n A_n
Forward:  y = W_n x + P_n x + b, the branch without dropout
Gradient: W_n is a constant: A and B get the gradient of a plain pair, at the full effective weight.
Trains:   what the pair trains
Exactly:  the differences telescope, W_n = W0 + λ (P_n − P_K), so nothing need be written into the base:

              y = W0 x + (1 + λ) · P_n x − λ · P_K x + b               up = [up_n, up_K],  down = [(1+λ) down_n ; −λ down_K]

          The anchor P_K is a copy of the pair after K steps. The total change has rank 2r, r if K = 0 (then P_K = 0).
          `update="telescoped"` is this. `update="in_place"` moves a copy of the base weight, and is saved as this.
Anchor:   the pair after exactly K finished steps. The algorithm as others transcribe it counts t from 0 and moves W where
          t > K, so that its anchor is the pair after K + 1 steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lorakin.errors import LorakinWarning
from lorakin.family.measure import Target
from lorakin.family.member import Modifier, Parametrisation
from lorakin.family.pair import Pair, Shape, Tensors, widened
from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.settings import number, one_of, require, whole_number
from lorakin.family.slots import Slot, Slots

if TYPE_CHECKING:
    from lorakin.family.method import Method

ANCHOR_UP, ANCHOR_DOWN = "up_K", "down_K"


@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(Modifier):
    """Delta-LoRA.

    Args:
        lam: λ, how far the base moves with the product.
        start_step: K, the optimizer steps before it begins to; see the anchor above.
        update: `telescoped`, exact and without touching the base, or `in_place`, as the paper writes it.

    Raises:
        SettingError: a value outside its range; dropout, which the base's part of the forward cannot follow.
    """

    word: ClassVar[str] = "delta-lora"
    paper: ClassVar[str] = (
        "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices, arXiv 2309.02411"
    )
    decides: ClassVar[Mapping[str, str]] = {"base": "the base weight moves with the product"}
    slots: ClassVar[Slots] = {
        ANCHOR_UP: Slot(("outputs", "rank"), trained=False),
        ANCHOR_DOWN: Slot(("rank", "inputs"), trained=False),
    }
    pair_defaults: ClassVar[Mapping[str, Any]] = {"rank": 8, "alpha": 16.0}
    small: ClassVar[Mapping[str, Any]] = {"start_step": 4}
    in_probe: ClassVar[bool] = False
    remark: ClassVar[str] = (
        "With start_step=0, under Adam, the same as alpha times (1 + lam): compare it with that."
    )

    lam: float = 2.0
    start_step: int = 500
    update: Literal["telescoped", "in_place"] = "telescoped"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_dropout(self.dropout)
        number(self, "lam", lambda lam: 0 < lam < float("inf"), "a positive number")
        whole_number(self, "start_step", at_least=0)
        one_of(self, "update", ("telescoped", "in_place"))

    @property
    def acts_at_steps(self) -> bool:
        return True

    @property
    def alpha_factor(self) -> float:
        return 1 + self.lam

    @classmethod
    def fair(cls, rank: int, scaling: float, steps: int) -> dict[str, Any]:
        return super().fair(rank, scaling, steps) | {"start_step": min(cls.start_step, steps // 4)}

    def resolved(self, method: Any, total_steps: int | None) -> Self:
        require(
            total_steps is None or total_steps > self.start_step,
            f"delta-lora begins after start_step={self.start_step} optimizer steps, but the run has {total_steps}, so it would "
            "never begin; lower start_step or train longer",
        )
        return self

    def check_pair(self, parametrisation: Parametrisation) -> None:
        self._refuse_dropout(parametrisation.dropout)

    @staticmethod
    def _refuse_dropout(dropout: float | None) -> None:
        require(
            not dropout,
            f"delta-lora takes no dropout, but it is {dropout}: the base moves, and cannot drop inputs",
        )

    def started(
        self,
        tensors: dict[str, Tensors],
        targets: Mapping[str, Target],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        if self.start_step or self.update == "in_place":
            return tensors
        return {
            path: there | self._anchor_at_start(path, there, targets[path].shape, methods[path])
            for path, there in tensors.items()
        }

    @staticmethod
    def _anchor_at_start(path: str, tensors: Tensors, shape: Shape, method: Method) -> Tensors:
        """The anchor at K = 0: of rank 0 where the pair is zero then, else a copy of the pair."""
        slots = method.slots_at(path, shape)
        if any(slot.starts_at_zero for slot in slots.values()):
            return {ANCHOR_UP: next(iter(tensors.values())).new_zeros(0)}
        pair = method.parametrisation.change(widened(tensors), shape).pair(shape)
        trains_down = any(s.trained and s.shape == ("rank", "inputs") for s in slots.values())
        anchor = {ANCHOR_UP: pair.up.clone()}
        return anchor | ({ANCHOR_DOWN: pair.down.clone()} if trains_down else {})

    def amend_pair(self, pair: Pair, tensors: Mapping[str, Tensor]) -> Pair:
        if ANCHOR_UP not in tensors:
            return pair
        up, down, grown = pair.up, pair.down, 1 + self.lam
        slowed = Pair(_gradient_over(up, grown), _gradient_over(down, grown))
        if not tensors[ANCHOR_UP].numel():
            return pair._replace(up=slowed.up, down=grown * slowed.down)
        if ANCHOR_DOWN not in tensors:  # down never trains, so that one pair holds both
            return pair._replace(up=grown * slowed.up - self.lam * tensors[ANCHOR_UP])
        return pair._replace(
            up=torch.cat([slowed.up, tensors[ANCHOR_UP]], 1),
            down=torch.cat([grown * slowed.down, -self.lam * tensors[ANCHOR_DOWN]], 0),
        )

    def rule(self, modules: Sequence[AdaptedModule]) -> Rule:
        return (Anchoring if self.update == "telescoped" else InPlace)(self, modules)


class Anchoring(Rule):
    """After step K: the pair as it is then becomes the anchor of every module. One that is there already stays."""

    def __init__(self, member: DeltaLoRA, modules: Sequence[AdaptedModule]) -> None:
        self.member, self.modules, self.turns = member, modules, (member.start_step,)

    def after(self, n: int, optimizer: torch.optim.Optimizer) -> None:
        if n != self.member.start_step:
            return
        made: dict[tuple[int, ...], Tensors] = {}
        for module in self.modules:
            if ANCHOR_UP not in module.tensors():
                key = tuple(
                    map(id, module.tensors().values())
                )  # modules that share their pair share its anchor
                for slot, tensor in made.setdefault(key, anchor_of(module)).items():
                    module.put(slot, tensor)

    def check(self, n: int) -> str | None:
        if n > self.member.start_step or any(
            ANCHOR_UP in module.tensors() for module in self.modules
        ):
            return None
        return (
            f"delta-lora never began: training stopped after {n} optimizer steps, start_step is {self.member.start_step}; "
            "what is saved is a plain pair"
        )


class InPlace(Anchoring):
    """After every step n > K: W += λ · (P_n − P_{n−1}), as the paper writes it. It keeps the anchors itself."""

    def __init__(self, member: DeltaLoRA, modules: Sequence[AdaptedModule]) -> None:
        super().__init__(member, modules)
        self.anchors: dict[str, Tensors] = {}
        self.last: dict[str, Tensor] = {}
        weights, exact = [module.weight for module in modules], "update='telescoped' is exact"
        require(
            all(isinstance(w, Tensor) for w in weights),
            f"delta-lora in place cannot move quantised weights; {exact}",
        )
        self.restore({})  # of an earlier run
        if narrow := [weight.dtype for weight in weights if weight.dtype.itemsize < 4]:
            lost = f"delta-lora in place moves weights in {narrow[0]}, which rounds most of each small step away; {exact}"
            warnings.warn(lost, LorakinWarning, stacklevel=2)
        if not member.start_step:
            self._begin()

    def _begin(self) -> None:
        for module in self.modules:
            if module.path not in self.anchors:
                self.anchors[module.path] = anchor_of(module, whole=True)
                self.last[module.path] = product_of(module)

    def after(self, n: int, optimizer: torch.optim.Optimizer) -> None:
        for module in self.modules:
            if module.path in self.anchors:
                product = product_of(module)
                module.move_base(
                    self.member.lam * (product - self.last[module.path].to(product.device))
                )
                self.last[module.path] = product
        if n == self.member.start_step:
            self._begin()

    def beside(self, path: str) -> Tensors:
        return self.anchors.get(path, {})

    def end(self) -> None:
        """Give the anchors to the modules and the base its own weight: the telescoped form of the same."""
        for module in self.modules:
            for slot, tensor in self.anchors.pop(module.path, {}).items():
                module.put(slot, tensor)
            module.restore_base()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take anchors that are there off the modules, and move the base by what they say."""
        for module in self.modules:
            if ANCHOR_UP in module.tensors():
                anchor = {slot: module.take(slot) for slot in (ANCHOR_UP, ANCHOR_DOWN)}
                self.anchors[module.path] = anchor
                self.last[module.path] = product = product_of(module)
                module.move_base(
                    self.member.lam * (product - anchor[ANCHOR_UP] @ anchor[ANCHOR_DOWN])
                )

    def check(self, n: int) -> str | None:
        return None if self.anchors else super().check(n)


def anchor_of(module: AdaptedModule, whole: bool = False) -> Tensors:
    """A copy of the module's pair, without `down` where that never trains, unless `whole`."""
    with torch.enable_grad():
        pair = pair_of(module)
    anchor = {ANCHOR_UP: pair.up.detach().clone()}
    return (
        anchor | {ANCHOR_DOWN: pair.down.detach().clone()}
        if whole or pair.down.requires_grad
        else anchor
    )


@torch.no_grad()
def product_of(module: AdaptedModule) -> Tensor:
    """P = up·down of the module (out, in), in the dtype of its pair."""
    pair = pair_of(module)
    return pair.up @ pair.down


def pair_of(module: AdaptedModule) -> Pair:
    """The pair before the base's part is added, in float32 at least."""
    return module.method.parametrisation.change(widened(module.tensors()), module.shape).pair(
        module.shape
    )


def _gradient_over(tensor: Tensor, divisor: float) -> Tensor:
    """The same values to the bit, their gradient divided."""
    constant = tensor.detach()
    return constant + (tensor - constant) / divisor
