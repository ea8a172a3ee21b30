"""LoRA-FA: the random factor A stays as it was drawn, only B trains.

Paper:    "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303; the
          corrected gradient is from its later version.
Forward:  as the pair it is used on
Trains:   B alone, r · out numbers; in an embedding's pair the vocabulary factor alone. On AdaLoRA's P·Λ·Q the factor
          Q is frozen, orthonormal from the start.
Backward: ∂B = s · δᵀz with z = A x̃ (N, r); ∂x = δ W0 + mask(s · (δ B) A). Autograd keeps z, never x or x̃, since
          nothing that x is multiplied by trains: r numbers per token instead of `in`.
Correction (`corrected`): g_B = s⁻² · ∂B · (A Aᵀ)⁻¹ minimises ‖s · g_B · A − ∂W‖ (Frobenius), the distance to the
          gradient of full fine-tuning. (A Aᵀ)⁻¹ is constant, computed once. The authors' optimizer always does it, here it is
          asked for. Under Adam the loss hardly changes, B does: docs/methods/lora-fa.md has figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lorakin.family.lora import INITS
from lorakin.family.measure import Target
from lorakin.family.member import Modifier, Parametrisation
from lorakin.family.pair import Shape, Tensors
from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.settings import one_of, require
from lorakin.family.slots import Slots, factors_of, frozen


@dataclass(frozen=True, kw_only=True)
class LoRAFA(Modifier):
    """LoRA-FA.

    Args:
        corrected: give B the gradient that brings the change closest to the full gradient, as the authors' optimizer always
            does. Plain B·A only.
        init: how A is drawn, see `LoRA`; with `orthonormal` the correction is one number.

    Raises:
        SettingError: a value outside its range.
    """

    word: ClassVar[str] = "lora-fa"
    paper: ClassVar[str] = (
        "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning, arXiv 2308.03303"
    )
    decides: ClassVar[Mapping[str, str]] = {
        "projection": "the random factor A stays as it was drawn"
    }
    pair_settings: ClassVar[tuple[str, ...]] = (*Modifier.pair_settings, "init")

    corrected: bool = False
    init: Literal["kaiming", "gaussian", "orthonormal"] | None = field(default=None)

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

    def misfit(self, parametrisation: type[Parametrisation]) -> str | None:
        if not any(slot.drawn for slot in parametrisation.slots.values()):
            return f"{parametrisation.word} has no random factor to keep as it was drawn"
        if self.corrected and factors_of(parametrisation.slots) is None:
            return "its corrected gradient is defined for a plain product B·A; leave corrected=True out"
        return None

    def started(
        self,
        tensors: dict[str, Tensors],
        targets: Mapping[str, Target],
        methods: Mapping,  # type: ignore[type-arg]
    ) -> dict[str, Tensors]:
        return {
            path: methods[path].parametrisation.keep_drawn(there, targets[path].shape)
            for path, there in tensors.items()
        }

    def amend_slots(self, slots: Slots, path: str, shape: Shape) -> Slots:
        return {**slots, **frozen({name: slot for name, slot in slots.items() if slot.drawn})}

    def rule(self, places: Sequence[AdaptedModule]) -> Rule | None:
        return Corrected(places) if self.corrected else None


class Corrected(Rule):
    """Before each step: ∂B ← s⁻² · ∂B · (A Aᵀ)⁻¹; for an embedding, whose B is the frozen factor, ∂A ← s⁻² · (Bᵀ B)⁻¹ · ∂A."""

    def __init__(self, places: Sequence[AdaptedModule]) -> None:
        self.places = places
        self.inverses: dict[str, Tensor] = {}

    def before(self, n: int) -> None:
        done: set[int] = set()
        for place in self.places:
            A, B = (place.tensors()[slot] for slot in ("A", "B"))
            trained = A if place.shape.lookup else B
            if trained.grad is None or id(trained) in done:  # a shared pair once
                continue
            done.add(id(trained))
            inverse = self.inverses.get(path := place.path)
            if inverse is None or inverse.device != trained.device:
                wide = torch.promote_types(A.dtype, torch.float32)
                gram = (
                    B.to(wide).T @ B.to(wide) if place.shape.lookup else A.to(wide) @ A.to(wide).T
                )
                scale: float = place.method.parametrisation.scaling  # type: ignore[attr-defined]
                inverse = self.inverses[path] = torch.linalg.inv(gram.detach()) / scale**2
            grad = trained.grad.to(inverse.dtype)
            trained.grad.copy_(inverse @ grad if place.shape.lookup else grad @ inverse)
