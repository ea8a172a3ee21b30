"""Delta-LoRA: after K steps the base weight moves too, with every step of the low-rank product.

Paper:    "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices",
          arXiv 2309.02411.
Forward:  y = W_n x + P_n x + b, where the branch has no dropout and for every optimizer step n > K

              W_n = W_{n−1} + λ · (P_n − P_{n−1}),      P_n = s · B_n A_n

Shapes:   the pair's; the anchor P_K is a second pair of the same shapes
Trains:   what the pair trains. W_n is a constant for the gradient: A and B get the gradient of a
          plain pair at the full effective weight.
Start:    the pair's; with K = 0 the anchor is the pair at the start
Exactly:  the differences telescope, W_n = W0 + λ (P_n − P_K), so nothing need be written into the
          base:

              y = W0 x + (1 + λ) · P_n x − λ · P_K x + b
              up = [up_n, up_K],  down = [(1+λ) down_n ; −λ down_K]

          The change has rank 2r, or r if P_K = 0. `update="telescoped"` computes this.
          `update="in_place"` moves a copy of the base weight, and is saved in this form.
Anchor:   the pair after exactly K finished steps. The algorithm as others transcribe it counts t
          from 0 and moves W where t > K, so its anchor is the pair after K + 1 steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lorakin.errors import LorakinWarning, SettingError
from lorakin.family.measure import UnadaptedModule
from lorakin.family.member import Modifier, Parametrisation
from lorakin.family.pair import Pair, Shape, Tensors
from lorakin.family.precision import widened
from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.settings import one_of, require, to_number, to_whole_number
from lorakin.family.slots import Slot, Slots
from lorakin.family.weight import FrozenWeight

if TYPE_CHECKING:
    from lorakin.family.method import Method

K_UP, K_DOWN = "up_K", "down_K"
"""The slots of the anchor, the pair after step K."""


@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(Modifier):
    """Delta-LoRA: the base weight moves with the product.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> adapter = lk.adapt(model, lk.DeltaLoRA(rank=2, start_step=100), "0")
    >>> adapter.placement.method.words
    'delta-lora'

    Args:
        lam: λ, how far the base moves with the product.
        start_step: K, the optimizer steps before the base begins to move.
        update: `telescoped`, exact and without touching the base, or `in_place`, as the paper
            writes it.

    Raises:
        SettingError: a value is outside its range, or dropout is set, which the base's part of the
            forward cannot follow.
    """

    word: ClassVar[str] = "delta-lora"
    paper: ClassVar[str] = (
        "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices, "
        "arXiv 2309.02411"
    )
    decides: ClassVar[Mapping[str, str]] = {"base": "the base weight moves with the product"}
    slots: ClassVar[Slots] = {
        K_UP: Slot(("outputs", "rank"), trained=False),
        K_DOWN: Slot(("rank", "inputs"), trained=False),
    }
    pair_defaults: ClassVar[Mapping[str, Any]] = {"rank": 8, "alpha": 16.0}
    test_settings: ClassVar[Mapping[str, Any]] = {"start_step": 4}
    in_probe: ClassVar[bool] = False
    remark: ClassVar[str] = (
        "With start_step=0, under Adam, it equals LoRA with alpha times (1 + lam): compare it with "
        "that."
    )

    lam: float = 2.0
    start_step: int = 500
    update: Literal["telescoped", "in_place"] = "telescoped"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_dropout(self.dropout)
        to_number(self, "lam", lambda lam: 0 < lam < float("inf"), "a positive number")
        to_whole_number(self, "start_step", at_least=0)
        one_of(self, "update", ("telescoped", "in_place"))

    @property
    def acts_at_steps(self) -> bool:
        return True

    @property
    def alpha_factor(self) -> float:
        return 1 + self.lam

    @classmethod
    def comparable_settings(cls, rank: int, scaling: float, steps: int) -> dict[str, Any]:
        return super().comparable_settings(rank, scaling, steps) | {
            "start_step": min(cls.start_step, steps // 4)
        }

    def resolved(self, method: Any, total_steps: int | None) -> Self:
        require(
            total_steps is None or total_steps > self.start_step,
            f"delta-lora begins after start_step={self.start_step} optimizer steps, but the run "
            f"has only {total_steps}; lower start_step or train longer",
        )
        return self

    def check_pair(self, pair: Parametrisation) -> None:
        self._check_dropout(pair.dropout)

    @staticmethod
    def _check_dropout(dropout: float | None) -> None:
        require(
            not dropout,
            f"delta-lora takes no dropout, but dropout={dropout}: part of the change is in the "
            "base weight, which cannot drop inputs; set dropout=0",
        )

    def amend_start(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        if self.start_step or self.update == "in_place":
            return tensors
        return {
            path: of_module
            | self._anchor_at_start(path, of_module, modules[path].shape, methods[path])
            for path, of_module in tensors.items()
        }

    @staticmethod
    def _anchor_at_start(path: str, tensors: Tensors, shape: Shape, method: Method) -> Tensors:
        """Returns the anchor at K = 0: empty if the pair starts at zero, else the pair's copy."""
        slots = method.slots_at(path, shape)
        if any(slot.starts_at_zero for slot in slots.values()):
            return {K_UP: next(iter(tensors.values())).new_zeros(0)}
        pair = method.parametrisation.change(widened(tensors)).pair(shape)
        trains_down = any(s.trained and s.shape == ("rank", "inputs") for s in slots.values())
        anchor = {K_UP: pair.up.clone()}
        return anchor | ({K_DOWN: pair.down.clone()} if trains_down else {})

    def amend_pair(self, pair: Pair, tensors: Mapping[str, Tensor]) -> Pair:
        if K_UP not in tensors:
            return pair

        # The values are (1+λ)·P_n; the gradient is that of P_n, since W_n is a constant.
        factor = 1 + self.lam
        up, down = (gradient_over(t, factor) for t in (pair.up, pair.down))
        if not tensors[K_UP].numel():
            return pair._replace(up=up, down=factor * down)
        # If `down` never trains, one pair holds both terms.
        if K_DOWN not in tensors:
            return pair._replace(up=factor * up - self.lam * tensors[K_UP])
        return pair._replace(
            up=torch.cat([up, tensors[K_UP]], 1),
            down=torch.cat([factor * down, -self.lam * tensors[K_DOWN]], 0),
        )

    def rule(self, modules: Sequence[AdaptedModule]) -> Rule:
        return (Anchoring if self.update == "telescoped" else InPlace)(self, modules)


class Anchoring(Rule):
    """After step K, makes the pair the anchor of every module that has no anchor yet."""

    def __init__(self, member: DeltaLoRA, modules: Sequence[AdaptedModule]) -> None:
        self.member, self.modules, self.grows_after = member, modules, (member.start_step,)

    def after(self, n: int, optimizer: torch.optim.Optimizer) -> None:
        if n != self.member.start_step:
            return
        anchors: dict[tuple[int, ...], Tensors] = {}
        for module in self.modules:
            if K_UP in module.tensors():
                continue
            # Modules that share their pair share its anchor.
            pair = tuple(map(id, module.tensors().values()))
            for slot, tensor in anchors.setdefault(pair, _anchor_of(module)).items():
                module.put(slot, tensor)

    def unfinished(self, n: int) -> str | None:
        has_begun = any(K_UP in module.tensors() for module in self.modules)
        if n > self.member.start_step or has_begun:
            return None
        return (
            f"delta-lora never began: training stopped after {n} optimizer steps, but "
            f"start_step={self.member.start_step}; the saved adapter is a plain pair"
        )


class InPlace(Anchoring):
    """After every step n > K: W += λ · (P_n − P_{n−1}), as the paper writes it.

    It holds the anchors itself, so that the modules' pairs stay plain while it trains.
    """

    def __init__(self, member: DeltaLoRA, modules: Sequence[AdaptedModule]) -> None:
        super().__init__(member, modules)
        self.anchors: dict[str, Tensors] = {}
        self.last: dict[str, Tensor] = {}
        """P_{n−1} by path."""
        _check_movable([module.weight for module in modules])
        # An earlier run may have left anchors on the modules.
        self._take_over_anchors()
        if not member.start_step:
            self._begin()

    def _begin(self) -> None:
        """Makes the pair the anchor of every module that has none."""
        for module in self.modules:
            if module.path not in self.anchors:
                self.anchors[module.path] = _anchor_of(module, with_frozen=True)
                self.last[module.path] = _product_of(module)

    def after(self, n: int, optimizer: torch.optim.Optimizer) -> None:
        for module in self.modules:
            if module.path in self.anchors:
                product = _product_of(module)
                moved = product - self.last[module.path].to(product.device)
                module.move_base(self.member.lam * moved)
                self.last[module.path] = product
        if n == self.member.start_step:
            self._begin()

    def extra_tensors(self, path: str) -> Tensors:
        return self.anchors.get(path, {})

    def end(self) -> None:
        """Returns to the telescoped form: anchors on the modules, and the base weight unmoved."""
        for module in self.modules:
            for slot, tensor in self.anchors.pop(module.path, {}).items():
                module.put(slot, tensor)
            module.restore_base()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._take_over_anchors()

    def _take_over_anchors(self) -> None:
        """Takes the anchors off the modules, and moves the base by what was trained since."""
        for module in self.modules:
            if K_UP in module.tensors():
                anchor = {slot: module.take(slot) for slot in (K_UP, K_DOWN)}
                product = _product_of(module)
                moved = product - anchor[K_UP] @ anchor[K_DOWN]
                module.move_base(self.member.lam * moved)
                self.anchors[module.path], self.last[module.path] = anchor, product

    def unfinished(self, n: int) -> str | None:
        return None if self.anchors else super().unfinished(n)


def _check_movable(weights: Sequence[Tensor | FrozenWeight]) -> None:
    """Checks that weights can be moved in place, and warns of those that lose small steps.

    Raises:
        SettingError: a weight is quantised.
    """
    exact = "update='telescoped' is exact"
    for weight in weights:
        if not isinstance(weight, Tensor):
            raise SettingError(f"delta-lora in place cannot move quantised weights; {exact}")
    if narrow := [weight.dtype for weight in weights if weight.dtype.itemsize < 4]:
        warnings.warn(
            f"delta-lora in place moves weights in {narrow[0]}, which rounds away most of each "
            f"small step; {exact}",
            LorakinWarning,
            stacklevel=3,
        )


def _anchor_of(module: AdaptedModule, with_frozen: bool = False) -> Tensors:
    """Returns a copy of the module's pair, without a `down` that never trains.

    `with_frozen` includes that too.
    """
    # With gradients, `down` says whether it trains.
    with torch.enable_grad():
        pair = _pair_of(module)
    anchor = {K_UP: pair.up.detach().clone()}
    if with_frozen or pair.down.requires_grad:
        anchor[K_DOWN] = pair.down.detach().clone()
    return anchor


@torch.no_grad()
def _product_of(module: AdaptedModule) -> Tensor:
    """Returns P = up·down of the module, (out, in), in the dtype of its pair."""
    pair = _pair_of(module)
    return pair.up @ pair.down


def _pair_of(module: AdaptedModule) -> Pair:
    """Returns the module's pair before the base's part is added, in float32 at least."""
    device = module.weight.device  # a tensor that modules share may be on another
    tensors = {slot: tensor.to(device) for slot, tensor in module.tensors().items()}
    return module.method.parametrisation.change(widened(tensors)).pair(module.shape)


def gradient_over(tensor: Tensor, divisor: float) -> Tensor:
    """Returns the same values, with the gradient divided by `divisor`."""
    if torch.compiler.is_compiling():
        # A compiler cannot trace a function with a jvp. It makes one kernel of this.
        part = tensor / divisor
        return part + (tensor - part).detach()
    same: Tensor = GradientOver.apply(tensor, divisor)  # type: ignore[no-untyped-call]
    return same


class GradientOver(torch.autograd.Function):
    """What `gradient_over` computes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, divisor: float) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.divisor = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.divisor, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        divided: Tensor = tangent / ctx.divisor
        return divided
