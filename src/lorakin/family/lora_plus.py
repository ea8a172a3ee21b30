"""LoRA+: the factor that starts at zero learns `ratio` times faster than the other.

Paper:    "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.
Forward:  the pair's
Shapes:   the pair's
Trains:   what the pair trains, at these rates (η the base rate, ρ the ratio):

              the factor that starts at zero (B; VeRA's b; AdaLoRA's Λ)       ρη
              the other factor (A; VeRA's d; AdaLoRA's P and Q)               η
              DoRA's magnitude, heads and everything else                     η
              both factors of an embedding's pair                             `embedding_lr`

Start:    the pair's
Identity: under Adam, a factor's scale is a learning rate in disguise. With B = ρB̃ the change
          s·BA is (ρs)·B̃A, and ∂B̃ = ρ·∂B. Adam divides by the gradient's own size, so a step η
          on B̃ is a step ρη on B. Hence LoRA+ with (alpha, η, ρ) is LoRA with (ρ·alpha, η). This is
          exact when ε = 0, nothing decays and nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lorakin.family.member import Modifier, Parametrisation
from lorakin.family.pair import Shape
from lorakin.family.settings import to_number
from lorakin.family.slots import Slots

if TYPE_CHECKING:
    from lorakin.family.method import Method


@dataclass(frozen=True)  # not kw_only, so that `LoRAPlus(16)` works
class LoRAPlus(Modifier):
    """LoRA+: the outer factor learns faster.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> adapter = lk.adapt(model, lk.LoRAPlus(rank=2, ratio=16), "0")
    >>> optimizer = adapter.optimizer(torch.optim.AdamW, lr=1e-4)
    >>> sorted(group["lr"] for group in optimizer.param_groups)
    [0.0001, 0.0016]

    Args:
        ratio: how many times faster the zero-initialised factor learns, at least 1. The authors'
            scripts use 10 to 80.
        embedding_lr: the learning rate of pairs on embeddings; the default is the authors'. None
            trains them like all other pairs.

    Raises:
        SettingError: a value is outside its range.
    """

    word: ClassVar[str] = "lora+"
    paper: ClassVar[str] = "LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354"
    decides: ClassVar[Mapping[str, str]] = {
        "rates": "the factor that starts at zero learns faster than the other"
    }
    test_settings: ClassVar[Mapping[str, Any]] = {"ratio": 4.0}
    learning_rate_factor: ClassVar[float] = 0.5
    remark: ClassVar[str] = (
        "Under Adam it equals LoRA with alpha times ratio at one learning rate: compare it with "
        "that before you keep it."
    )

    ratio: float = 16.0
    embedding_lr: float | None = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        to_number(self, "ratio", lambda ratio: 1 <= ratio < float("inf"), "a number ≥ 1")
        to_number(
            self,
            "embedding_lr",
            lambda lr: 0 < lr < float("inf"),
            "a positive number",
            optional=True,
        )

    @property
    def alpha_factor(self) -> float:
        return self.ratio

    def refusal_of_pair(self, pair_class: type[Parametrisation]) -> str | None:
        if not fast_slots(pair_class.slots):
            return (
                f"{pair_class.word} trains no factor on the outputs' side that could learn faster"
            )
        return None

    def refusal_of_method(self, method: Method, slots: Slots) -> str | None:
        fast = fast_slots(slots)
        if any(slot.trained and name not in fast for name, slot in slots.items()):
            return None
        others = " and ".join(m.word for m in method.members if "projection" in m.decides)
        return (
            f"lora+ and {others} do not combine: only {' and '.join(fast)} would train, so ratio "
            "would only multiply the learning rate. Raise the learning rate instead, or add dora, "
            "whose magnitudes keep the base rate"
        )

    def amend_slots(self, slots: Slots, path: str, shape: Shape) -> Slots:
        if shape.lookup and self.embedding_lr is not None:
            return {name: replace(slot, fixed_lr=self.embedding_lr) for name, slot in slots.items()}
        fast = fast_slots(slots)
        return {n: replace(s, rate_factor=self.ratio) if n in fast else s for n, s in slots.items()}


def fast_slots(slots: Slots) -> list[str]:
    """Returns the slots that learn faster: those that start at zero, else the outputs' factor."""
    zero = [name for name, slot in slots.items() if slot.trained and slot.starts_at_zero]
    outer = [
        n for n, s in slots.items() if s.trained and s.belongs_to_pair and "outputs" in s.shape
    ]
    return zero or outer
