"""LoRA+: LoRA's forward; the factor that starts at zero learns `ratio` times faster than the other.

Paper:    "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.
Forward:  as the pair it is used on
Trains:   what the pair trains, at these rates (η the base rate, ρ the ratio):

              the factor that starts at zero (B; VeRA's b; AdaLoRA's Λ)      ρη
              the other factor (A; VeRA's d; AdaLoRA's P and Q)               η
              DoRA's magnitude, heads and everything else                     η
              both factors of an embedding's pair                             `embedding_lr`

Identity: under Adam a factor's scale is a learning rate in disguise. With B = ρB̃ the change s·BA is (ρs)·B̃A and
          ∂B̃ = ρ·∂B; Adam divides by the gradient's own size, so a step η on B̃ is a step ρη on B. Hence LoRA+ with
          (alpha, η, ρ) is LoRA with (ρ·alpha, η), exactly when ε = 0, nothing decays and nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from lorakin.family.member import Modifier, Role
from lorakin.family.pair import Shape
from lorakin.family.settings import number

if TYPE_CHECKING:
    from lorakin.family.composition import Method


@dataclass(frozen=True)
class LoRAPlus(Modifier):
    """LoRA+.

    Args:
        ratio: how many times faster the zero-initialised factor learns, at least 1. The authors' scripts use 10 to 80.
        embedding_lr: the rate of pairs on embeddings, the authors' default; None treats them as all others.

    Raises:
        SettingError: a value outside its range.
    """

    word: ClassVar[str] = "lora+"
    paper: ClassVar[str] = "LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354"
    decides: ClassVar[Mapping[str, str]] = {
        "rates": "the factor that starts at zero learns faster than the other"
    }
    learning_rate_factor: ClassVar[float] = 0.5
    remark: ClassVar[str] = (
        "Under Adam the same as alpha times ratio at one learning rate: compare it with that before you keep it."
    )

    ratio: float = field(default=16.0, kw_only=False)
    embedding_lr: float | None = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "ratio", lambda ratio: 1 <= ratio < float("inf"), "a number ≥ 1")
        number(
            self,
            "embedding_lr",
            lambda lr: 0 < lr < float("inf"),
            "a positive number",
            optional=True,
        )

    @property
    def alpha_factor(self) -> float:
        return self.ratio

    def vacuous(self, method: Method, roles: Mapping[str, Role]) -> str | None:
        if any(role.trained and not role.starts_at_zero for role in roles.values()):
            return None
        others = " and ".join(
            member.word for member in method.members if "projection" in member.decides
        )
        return (
            f"lora+ and {others} do not combine: nothing trains but the factor that starts at zero, so ratio would only "
            "multiply the learning rate; raise that. With dora they do, since magnitudes keep the base rate"
        )

    def rate(self, lr: float, role: Role, shape: Shape) -> float:
        if shape.lookup and self.embedding_lr is not None:
            return self.embedding_lr
        return self.ratio * lr if role.starts_at_zero else lr
