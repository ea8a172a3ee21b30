"""LoRA: freeze the weight, learn its change as a product of two thin matrices beside it.

Paper:    "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3; the scale of
          `rslora` from "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732.
Forward:  y = W0 x + b + s · B (A x̃)             x̃ = dropout(x) in train mode, x otherwise
Shapes:   W0 (out, in), A (r, in), B (out, r), s = alpha / r, or alpha / √r with `rslora`
Trains:   A and B, r · (in + out) numbers
Start:    B = 0, so training starts at the base model. A is uniform on ±1/√in, variance 1/(3·in), as public code
          draws it (`kaiming`), or normal with deviation 1/r (`gaussian`; the paper says only "Gaussian").
          An embedding swaps the roles: its vocabulary factor A is zero, B is standard normal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lorakin.family.member import Member, Pair, Shape, number, require, whole_number


@dataclass(frozen=True)
class LoRA(Member):
    """Plain LoRA.

    Args:
        rank: columns of B, at least 1 and at most the smaller side of every weight it meets.
        alpha: numerator of the scale, positive.
        dropout: probability of zeroing an entry of the branch's input, in [0, 1).
        rslora: scale by alpha/√rank instead of alpha/rank.
        init: how A is drawn, `kaiming` or `gaussian`.

    Raises:
        SettingError: a value outside its range.
    """

    word: ClassVar[str] = "lora"
    paper: ClassVar[str] = "LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
    learning_rate: ClassVar[float] = 2e-4

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self) -> None:
        whole_number(self, "rank", at_least=1)
        number(self, "alpha", lambda alpha: 0 < alpha < float("inf"), "a positive number")
        number(self, "dropout", lambda dropout: 0 <= dropout < 1, "a number in [0, 1)")
        require(isinstance(self.rslora, bool), f"rslora must be True or False, not {self.rslora!r}")
        require(self.init in ("kaiming", "gaussian"), f"init must be 'kaiming' or 'gaussian', not {self.init!r}")

    @property
    def scaling(self) -> float:
        """s, the factor in front of B·A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def check(self, shape: Shape, where: str) -> None:
        limit = min(shape.outputs, shape.inputs)
        require(
            self.rank <= limit,
            f"rank {self.rank} is above what {where} can use: its weight is {shape.outputs} × {shape.inputs}, so at "
            f"most rank {limit}. Lower the rank, give this module its own with rank_pattern, or leave it out with exclude.",
        )

    def start(self, shape: Shape, generator: torch.Generator | None, device: torch.device) -> dict[str, Tensor]:
        A = torch.zeros(self.rank, shape.inputs, device=device, dtype=torch.float32)
        B = torch.zeros(shape.outputs, self.rank, device=device, dtype=torch.float32)
        if shape.lookup:
            B.normal_(generator=generator)
        elif self.init == "gaussian":
            A.normal_(0, 1 / self.rank, generator=generator)
        else:
            bound = shape.inputs**-0.5
            A.uniform_(-bound, bound, generator=generator)
        return {"A": A, "B": B}

    def pair(self, tensors: Mapping[str, Tensor]) -> Pair:
        return Pair(up=self.scaling * tensors["B"], down=tensors["A"])
