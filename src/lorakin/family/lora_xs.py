"""LoRA-XS: train one small square matrix between the weight's own singular vectors.

Paper:    "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
          arXiv 2405.17604.
Forward:  y = W0 x + s · B (R (A x̃)) + b              s = alpha / r
Shapes:   B (out, r), R (r, r), A (r, in)
Trains:   R alone, r² parameters per module, whatever its size
Start:    W0 = U S Vᵀ,  B = U_r · S_r and A = V_rᵀ, both frozen;  R normal with deviation 1e-5
Backward: A never trains, so autograd need not keep x

R is not zero, so at the start the model equals the base only to within 1e-5 of the principal part.
The authors' code puts S_r on the other side, B = U_r and A = S_r · V_rᵀ. Both forms reach the same
changes, but R's gradient is scaled along the other axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorakin.family.change import LowRank
from lorakin.family.linear_algebra import leading_triplets
from lorakin.family.measure import WEIGHT, UnadaptedModule
from lorakin.family.member import Parametrisation
from lorakin.family.pair import Tensors
from lorakin.family.settings import check_pair_settings, to_whole_number
from lorakin.family.slots import Slot, Slots
from lorakin.family.weight import has_no_values

DEVIATION = 1e-5


@dataclass(frozen=True)
class LoRAXS(Parametrisation):
    """LoRA-XS: trains r² parameters per module.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> adapter = lk.adapt(model, lk.LoRAXS(rank=3, alpha=3), "0")
    >>> sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    9

    Args:
        rank: r, rows and columns of R; at least 1, at most every adapted weight's smaller side.
        alpha: numerator of the scale, positive.
        dropout: probability of zeroing an entry of the branch's input, in [0, 1).
        iterations: power iterations of a randomised SVD; None takes the exact SVD.

    Raises:
        SettingError: a value is outside its range.
    """

    word: ClassVar[str] = "lora-xs"
    paper: ClassVar[str] = (
        "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv 2405.17604"
    )
    decides: ClassVar[Mapping[str, str]] = {
        "parametrisation": "the change is B·R·A between the weight's singular vectors",
        "projection": "A is frozen already",
        "start": "A and B are the weight's principal singular vectors",
    }
    slots: ClassVar[Slots] = {
        "A": Slot(("rank", "inputs"), trained=False),
        "B": Slot(("outputs", "rank"), trained=False),
        "R": Slot(("rank", "rank")),
    }
    needs: ClassVar[frozenset[str]] = frozenset({WEIGHT})
    learning_rate: ClassVar[float] = 2e-3
    not_compared: ClassVar[frozenset[str]] = frozenset({"iterations"})
    test_settings: ClassVar[Mapping[str, Any]] = {"rank": 4, "alpha": 4}
    in_probe: ClassVar[bool] = False
    remark: ClassVar[str] = "It trains very few parameters; files also hold the frozen A and B."

    rank: int = 64
    alpha: float = 64.0
    dropout: float = 0.0
    iterations: int | None = None

    def __post_init__(self) -> None:
        to_whole_number(self, "rank", at_least=1)
        check_pair_settings(self)
        to_whole_number(self, "iterations", at_least=0, optional=True)

    @property
    def scaling(self) -> float:
        """s, the factor in front of B·R·A."""
        return self.alpha / self.rank

    def start(
        self, module: UnadaptedModule, generator: torch.Generator | None, device: torch.device
    ) -> Tensors:
        shape = module.shape
        R = torch.empty(self.rank, self.rank, device=device, dtype=torch.float32)
        R.normal_(0, DEVIATION, generator=generator)
        if has_no_values(R) or has_no_values(module.weight):
            A = torch.empty(self.rank, shape.inputs, device=device, dtype=torch.float32)
            B = torch.empty(shape.outputs, self.rank, device=device, dtype=torch.float32)
        else:
            U, S, A = leading_triplets(module.wide_weight(), self.rank, self.iterations)
            A, B = A.to(device).contiguous(), (U * S).to(device)
        return {"A": A, "B": B, "R": R}

    def change(self, tensors: Mapping[str, Tensor]) -> LowRank:
        return LowRank(tensors["B"] @ tensors["R"], tensors["A"], self.scaling)
