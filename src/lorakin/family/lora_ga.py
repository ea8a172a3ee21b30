"""LoRA-GA: the pair begins so that its first step follows full fine-tuning's.

Paper:    "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000, algorithm 1.
Forward:  y = W0 x + s · (B A − B_0 A_0) x + b
          The paper writes W0 − s·B_0·A_0 into the base. Here the base stays, and the frozen anchor
          B_0, A_0 takes the start away (`start.py`).
Shapes:   the pair's; the anchor has the same
Trains:   A and B, r · (in + out) parameters; the anchor has as many that do not train
Start:    the mean gradient of the loss by W0 over the first batches is G = U S Vᵀ;

              A = c · V_{1..r}ᵀ,  B = c · U_{r+1..2r},  c = out^¼ / √γ     the paper's stable scale

          At the first step ∂B then holds the first r triplets of G, and ∂A the next r.
Measured: G in eval mode; 2r ≤ min(out, in)

This is the authors' form. PEFT multiplies B by the gradient's singular values and does not scale A,
so its start depends on the size of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lorakin.family.linear_algebra import leading_triplets
from lorakin.family.measure import GRADIENTS, UnadaptedModule
from lorakin.family.pair import Shape
from lorakin.family.precision import all_finite
from lorakin.family.settings import require, to_number, to_whole_number
from lorakin.family.start import AnchoredStart

if TYPE_CHECKING:
    from lorakin.family.method import Method


@dataclass(frozen=True, kw_only=True)
class LoRAGA(AnchoredStart):
    """LoRA-GA: starts the pair at the gradient's singular vectors.

    >>> import torch, lorakin as lk
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 5)), torch.randn(32, 6)
    >>> def loss(model, batch):
    ...     return model(batch).square().mean()
    >>> before = model(x)
    >>> adapter = lk.adapt(model, lk.LoRAGA(rank=2), "0", probe=[x], loss=loss)
    >>> torch.equal(model(x), before)  # training begins exactly at the base
    True

    Args:
        gamma: γ, positive; a larger one makes a smaller start.
        first_batches: how many batches to average the gradient over, at most.
        iterations: power iterations of a randomised SVD of the gradient; None takes the exact SVD.

    Raises:
        SettingError: a value is outside its range.
    """

    word: ClassVar[str] = "lora-ga"
    paper: ClassVar[str] = (
        "LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv 2407.05000"
    )
    decides: ClassVar[Mapping[str, str]] = {"start": "the gradient's principal singular vectors"}
    needs: ClassVar[frozenset[str]] = frozenset({GRADIENTS})
    peft_start: ClassVar[str] = "lora_ga"
    remark: ClassVar[str] = (
        "It measures the gradients of a few batches first and holds each adapted weight's gradient "
        "in memory once. It keeps a frozen copy of the start beside the pair: files hold rank 2r."
    )

    gamma: float = 16.0
    first_batches: int = 8
    iterations: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        to_number(self, "gamma", lambda gamma: 0 < gamma < float("inf"), "a positive number")
        to_whole_number(self, "first_batches", at_least=1)
        to_whole_number(self, "iterations", at_least=0, optional=True)

    @property
    def batches(self) -> int | None:
        return self.first_batches

    def largest_rank(self, shape: Shape) -> int:
        return min(shape.outputs, shape.inputs) // 2

    def check(self, shape: Shape, path: str, method: Method) -> None:
        super().check(shape, path, method)
        most, rank = self.largest_rank(shape), method.setting("rank")
        require(
            rank <= most,
            f"lora-ga needs a rank of at most half the weight's smaller side; {path} is "
            f"{shape.outputs} × {shape.inputs}, so at most {most}, not {rank}. Lower the rank, "
            "give this module its own with rank_pattern, or leave it out with exclude",
        )

    def collector(
        self, modules: Mapping[str, UnadaptedModule], methods: Mapping[str, Method]
    ) -> MeanGradients:
        return MeanGradients()

    def initial_factors(
        self, module: UnadaptedModule, rank: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        gradient: Tensor = module.measured
        U, _, Vt = leading_triplets(gradient, 2 * rank, self.iterations)
        c = module.shape.outputs**0.25 / self.gamma**0.5
        return c * U[:, rank:], c * Vt[:rank]


class MeanGradients:
    """The mean over batches of each weight's gradient, (outputs, inputs), on the CPU."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.batches = 0

    def wants(self, path: str) -> bool:
        """Returns True: it takes the gradients of all modules and batches."""
        return True

    def add(self, path: str, measured: Tensor) -> None:
        """Adds the gradient of one call of a module."""
        total = self.sums.get(path)
        self.sums[path] = measured.cpu() if total is None else total.add_(measured.cpu())

    def end_batch(self) -> bool:
        """Counts a batch, and returns False: it never has enough."""
        self.batches += 1
        return False

    def results(self) -> dict[str, Any]:
        """Returns path → the mean gradient.

        Raises:
            SettingError: a gradient is zero or not finite, so that it has no directions.
        """
        for path, total in self.sums.items():
            require(all_finite(total), f"lora-ga: the gradient of {path} holds NaN or infinity")
            require(
                bool(total.any()),
                f"lora-ga: the gradient of {path} is zero on these batches, so there is nothing to "
                "start from. Are all labels masked? If the loss does not reach it, exclude it",
            )
        return {path: total / self.batches for path, total in self.sums.items()}
