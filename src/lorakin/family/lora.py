"""LoRA: freeze the weight and learn its change as a product of two thin matrices.

Paper:    "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3.
Forward:  y = W0 x + b + s · B (A x̃)             x̃ = dropout(x) in train mode, else x
Shapes:   W0 (out, in), A (r, in), B (out, r); s = alpha / r, or alpha / √r with `rslora`
Trains:   A and B, r · (in + out) parameters
Start:    B = 0, so the model begins as the base. `init` says how A is drawn:

              kaiming       uniform on ±1/√in, variance 1/(3·in), as public code draws it
              gaussian      normal with deviation 1/r (the paper says only "Gaussian")
              orthonormal   orthogonal rows of length 1/√3, the mean length of a kaiming row

          An embedding swaps the roles: its vocabulary factor A is zero, B is standard normal.
Scale:    `rslora` is from "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
          arXiv 2312.03732.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lorakin.family.change import LowRank
from lorakin.family.linear_algebra import orthonormal_rows
from lorakin.family.measure import UnadaptedModule
from lorakin.family.member import Parametrisation
from lorakin.family.pair import Tensors
from lorakin.family.settings import check_pair_settings, one_of, to_whole_number
from lorakin.family.slots import Slot, Slots

INITS = ("kaiming", "gaussian", "orthonormal")


@dataclass(frozen=True)
class LoRA(Parametrisation):
    """Plain LoRA. PEFT's names for its settings stand in brackets.

    >>> import lorakin as lk
    >>> lk.LoRA(rank=8, alpha=16).scaling
    2.0
    >>> lk.LoRA(rank=16, alpha=32, rslora=True).scaling
    8.0

    Args:
        rank: r, the columns of B; at least 1, at most the smaller side of every weight it adapts
            (`r`).
        alpha: numerator of the scale, positive (`lora_alpha`).
        dropout: probability of zeroing an entry of the branch's input, in [0, 1) (`lora_dropout`).
        rslora: scale by alpha/√rank instead of alpha/rank (`use_rslora`).
        init: how A is drawn: `kaiming`, `gaussian` or `orthonormal` (`init_lora_weights`).

    Raises:
        SettingError: a value is outside its range.
    """

    word: ClassVar[str] = "lora"
    paper: ClassVar[str] = "LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
    decides: ClassVar[Mapping[str, str]] = {"parametrisation": "the change is B·A"}
    slots: ClassVar[Slots] = {
        "A": Slot(("rank", "inputs"), is_random_factor=True, peft="lora_A.weight"),
        "B": Slot(("outputs", "rank"), starts_at_zero=True, peft="lora_B.weight"),
    }
    lookup_slots: ClassVar[Slots] = {
        "A": Slot(("rank", "inputs"), starts_at_zero=True, peft="lora_embedding_A"),
        "B": Slot(("outputs", "rank"), is_random_factor=True, peft="lora_embedding_B"),
    }
    test_settings: ClassVar[Mapping[str, Any]] = {"rank": 4}
    learning_rate: ClassVar[float] = 2e-4
    not_compared: ClassVar[frozenset[str]] = frozenset({"init"})

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    init: Literal["kaiming", "gaussian", "orthonormal"] = "kaiming"

    def __post_init__(self) -> None:
        to_whole_number(self, "rank", at_least=1)
        check_pair_settings(self)
        one_of(self, "init", INITS)

    @property
    def scaling(self) -> float:
        """s, the factor in front of B·A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def start(
        self, module: UnadaptedModule, generator: torch.Generator | None, device: torch.device
    ) -> Tensors:
        shape = module.shape
        A = torch.zeros(self.rank, shape.inputs, device=device, dtype=torch.float32)
        B = torch.zeros(shape.outputs, self.rank, device=device, dtype=torch.float32)
        if shape.lookup:
            B.normal_(generator=generator)
        elif self.init == "gaussian":
            A.normal_(0, 1 / self.rank, generator=generator)
        elif self.init == "orthonormal":
            A = orthonormal_rows(A.normal_(generator=generator)) / 3**0.5
        else:
            bound = shape.inputs**-0.5
            A.uniform_(-bound, bound, generator=generator)
        return {"A": A, "B": B}

    def change(self, tensors: Mapping[str, Tensor]) -> LowRank:
        return LowRank(up=tensors["B"], down=tensors["A"], scale=self.scaling)
