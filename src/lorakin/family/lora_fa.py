"""LoRA-FA: the random factor A stays as it was drawn, and only B trains.

Paper:    "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
          arXiv 2308.03303; the corrected gradient is from its later version.
Forward:  the pair's
Shapes:   the pair's
Trains:   B, r · out parameters; in an embedding's pair the vocabulary factor. AdaLoRA's P·Λ·Q
          trains P and Λ.
Start:    the pair's, except that AdaLoRA's Q starts orthonormal
Backward: ∂B = s · δᵀz with z = A x̃ (N, r); ∂x = δ W0 + mask(s · (δ B) A). Nothing that multiplies x
          trains, so autograd keeps z and neither x nor x̃: r numbers per token instead of `in`.
Option:   `corrected` takes g_B = s⁻² · ∂B · (A Aᵀ)⁻¹ instead of ∂B. It minimises ‖s · g_B · A − ∂W‖
          (Frobenius), the distance to the gradient of full fine-tuning. (A Aᵀ)⁻¹ never changes, so
          it is computed once. The authors' optimizer always corrects; here you ask for it. Under
          Adam the loss hardly changes, but B does: docs/methods/lora-fa.md has figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from lorakin.family.lora import INITS
from lorakin.family.measure import UnadaptedModule
from lorakin.family.member import Modifier, Parametrisation
from lorakin.family.pair import Shape, Tensors
from lorakin.family.precision import wide_dtype
from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.settings import one_of, require
from lorakin.family.slots import Slots, factors_of, frozen

if TYPE_CHECKING:
    from lorakin.family.method import Method


@dataclass(frozen=True, kw_only=True)
class LoRAFA(Modifier):
    """LoRA-FA: A stays as it was drawn.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> adapter = lk.adapt(model, lk.LoRAFA(rank=2), "0")
    >>> {name: p.requires_grad for name, p in model[0].lorakin.named_parameters()}
    {'default.A': False, 'default.B': True}

    Args:
        corrected: replace B's gradient by the one whose change of the weight is closest to the full
            gradient, as the authors' optimizer always does. Needs a plain product B·A.
        init: how A is drawn, see `LoRA`. With `orthonormal` the correction is one number.

    Raises:
        SettingError: a value is outside its range.
    """

    word: ClassVar[str] = "lora-fa"
    paper: ClassVar[str] = (
        "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning, "
        "arXiv 2308.03303"
    )
    decides: ClassVar[Mapping[str, str]] = {
        "projection": "the random factor A stays as it was drawn"
    }
    pair_settings: ClassVar[tuple[str, ...]] = (*Modifier.pair_settings, "init")

    corrected: bool = False
    init: Literal["kaiming", "gaussian", "orthonormal"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            isinstance(self.corrected, bool),
            f"corrected must be True or False, not {self.corrected!r}",
        )
        if self.init is not None:
            one_of(self, "init", INITS)

    @property
    def acts_at_steps(self) -> bool:
        return self.corrected

    def refusal_of_pair(self, pair_class: type[Parametrisation]) -> str | None:
        if not any(slot.is_random_factor for slot in pair_class.slots.values()):
            return f"{pair_class.word} has no random factor that could stay as it was drawn"
        if self.corrected and factors_of(pair_class.slots) is None:
            return "the corrected gradient needs a plain product B·A; leave corrected=True out"
        return None

    def amend_start(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        return {
            path: methods[path].parametrisation.start_if_frozen(of_module)
            for path, of_module in tensors.items()
        }

    def amend_slots(self, slots: Slots, path: str, shape: Shape) -> Slots:
        return {
            **slots,
            **frozen({name: slot for name, slot in slots.items() if slot.is_random_factor}),
        }

    def rule(self, modules: Sequence[AdaptedModule]) -> Rule | None:
        return Corrected(modules) if self.corrected else None


class Corrected(Rule):
    """Corrects the trained factor's gradient before each step.

    ∂B ← s⁻² · ∂B · (A Aᵀ)⁻¹. In an embedding's pair B is the frozen factor, and
    ∂A ← s⁻² · (Bᵀ B)⁻¹ · ∂A.
    """

    is_same_at_each_step = True

    def __init__(self, modules: Sequence[AdaptedModule]) -> None:
        self.modules = modules
        self.inverses: dict[str, Tensor] = {}

    def before(self, n: int) -> None:
        done: set[int] = set()
        for module in self.modules:
            A, B = (module.tensors()[slot] for slot in ("A", "B"))
            lookup = module.shape.lookup
            fixed, trained = (B, A) if lookup else (A, B)
            if trained.grad is None or id(trained) in done:  # a shared pair is corrected once
                continue
            done.add(id(trained))
            inverse = self._inverse(module, fixed)
            grad = trained.grad.to(inverse.dtype)
            trained.grad.copy_(inverse @ grad if lookup else grad @ inverse)

    def _inverse(self, module: AdaptedModule, fixed: Tensor) -> Tensor:
        """Returns s⁻² · (A Aᵀ)⁻¹, or for an embedding s⁻² · (Bᵀ B)⁻¹; computed once."""
        inverse = self.inverses.get(module.path)
        if inverse is not None and inverse.device == fixed.device:
            return inverse
        wide = fixed.detach().to(wide_dtype(fixed.dtype))
        gram = wide.T @ wide if module.shape.lookup else wide @ wide.T
        computed: Tensor = torch.linalg.inv(gram) / module.method.parametrisation.scaling**2
        self.inverses[module.path] = computed
        return computed
