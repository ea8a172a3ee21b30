"""LoRA-GA: the pair begins so that its first step goes where full fine-tuning's would.

Paper:    "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000, algorithm 1.
Start:    G, the mean gradient of the loss by W0 over the first batches, = U S Vᵀ

              A = c · V_{1..r}ᵀ,  B = c · U_{r+1..2r},  c = out^¼ / √γ        the paper's stable scale

          so that ∂B holds the gradient's first r triplets at the first step, and ∂A the next r
Forward:  y = W0 x + s · (B A − B_0 A_0) x + b        the paper writes W0 − s·B_0·A_0 into the base; here
          the base stays, and the frozen B_0, A_0 take the start away (`start.py`)
Trains:   A and B, r · (in + out) numbers; the anchor has as many that do not train

G is measured in eval mode. It needs 2r ≤ min(out, in). PEFT multiplies B by the gradient's singular
values and does not scale A, so that its start depends on the size of the loss; this is the authors' form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lorakin.family.measure import GRADIENTS, Target
from lorakin.family.pissa import leading_triplets
from lorakin.family.settings import number, require, whole_number
from lorakin.family.start import AnchoredStart

if TYPE_CHECKING:
    from lorakin.family.method import Method


@dataclass(frozen=True, kw_only=True)
class LoRAGA(AnchoredStart):
    """LoRA-GA.

    Args:
        gamma: γ, positive; the larger, the smaller the start.
        first_batches: how many batches the gradient is the mean of, at most.
        iterations: power iterations of a randomised SVD of the gradient; None takes the exact SVD.

    Raises:
        SettingError: a value outside its range.
    """

    word: ClassVar[str] = "lora-ga"
    paper: ClassVar[str] = (
        "LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv 2407.05000"
    )
    decides: ClassVar[Mapping[str, str]] = {"start": "the gradient's principal singular vectors"}
    needs: ClassVar[frozenset[str]] = frozenset({GRADIENTS})
    peft_start: ClassVar[str] = "lora_ga"
    remark: ClassVar[str] = (
        "It looks at the gradients of a few batches first, for which each adapted weight's gradient is "
        "held in memory once. A frozen copy of the start is kept beside the pair: files hold rank 2r."
    )

    gamma: float = 16.0
    first_batches: int = 8
    iterations: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "gamma", lambda gamma: 0 < gamma < float("inf"), "a positive number")
        whole_number(self, "first_batches", at_least=1)
        whole_number(self, "iterations", at_least=0, optional=True)

    @property
    def batches(self) -> int | None:
        return self.first_batches

    def collector(
        self, targets: Mapping[str, Target], methods: Mapping[str, Method]
    ) -> MeanGradients:
        for path, method in methods.items():
            shape, rank = targets[path].shape, method.setting("rank")
            require(
                2 * rank <= min(shape[:2]),
                f"lora-ga needs twice its rank of a weight's smaller side; {path} is {shape.outputs} × "
                f"{shape.inputs}, so at most rank {min(shape[:2]) // 2}, not {rank}",
            )
        return MeanGradients()

    def factors(self, target: Target, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        gradient: Tensor = target.measured
        U, _, Vt = leading_triplets(gradient, 2 * rank, self.iterations)
        c = target.shape.outputs**0.25 / self.gamma**0.5
        return c * U[:, rank:], c * Vt[:rank]


class MeanGradients:
    """The mean over batches of each weight's gradient, (outputs, inputs) in float32 at least, on the CPU."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.batches = 0

    def wants(self, path: str) -> bool:
        """Every module's gradient of every batch."""
        return True

    def see(self, path: str, seen: Tensor) -> None:
        """Add the gradient of one call of a module."""
        there = self.sums.get(path)
        self.sums[path] = seen.cpu() if there is None else there.add_(seen.cpu())

    def settled(self) -> bool:
        """A batch is over; there is always more to see."""
        self.batches += 1
        return False

    def found(self) -> dict[str, Any]:
        """Path → the mean gradient."""
        return {path: total / self.batches for path, total in self.sums.items()}
