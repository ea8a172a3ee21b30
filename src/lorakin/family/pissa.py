"""PiSSA: the pair begins as the weight's principal part, so that training moves what matters most.

Paper:    "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
          Models", arXiv 2404.02948, equations 2 to 5.
Forward:  y = W0 x + s · (B A − B_0 A_0) x + b
          The paper writes the residual W0 − s·B_0·A_0 into the base. Here the base stays, and the
          frozen anchor B_0, A_0 takes the start away (`start.py`).
Shapes:   the pair's; the anchor has the same
Trains:   A and B, r · (in + out) parameters; the anchor has as many that do not train
Start:    W0 = U S Vᵀ,  B = U_r · √(S_r / s),  A = √(S_r / s) · V_rᵀ,  so s·B·A = U_r S_r V_rᵀ
SVD:      exact, in float32 at least. With `iterations` it is randomised: far faster for large
          weights, and the start is only near the principal part. The anchor is whatever the pair
          started with, so nothing else changes.

On a quantised base the paper quantises the residual, which makes another base. Here the quantised
base stays as it is, and the pair starts from its dequantised weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lorakin.family.linear_algebra import leading_triplets
from lorakin.family.measure import WEIGHT, UnadaptedModule
from lorakin.family.settings import to_whole_number
from lorakin.family.start import AnchoredStart


@dataclass(frozen=True, kw_only=True)
class PiSSA(AnchoredStart):
    """PiSSA: starts the pair at the principal singular triplets of the weight.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> W, x = model[0].weight.detach().clone(), torch.ones(1, 6)
    >>> before = model(x)
    >>> adapter = lk.adapt(model, lk.PiSSA(rank=2, alpha=2), "0")
    >>> torch.equal(model(x), before)  # training begins exactly at the base
    True
    >>> pair = model[0].lorakin.default
    >>> U, S, Vt = torch.linalg.svd(W)
    >>> torch.allclose(pair.B @ pair.A, U[:, :2] * S[:2] @ Vt[:2], atol=1e-5)
    True

    Args:
        iterations: power iterations of a randomised SVD, at least 0; None takes the exact SVD. The
            paper finds 4 to be enough.

    Raises:
        SettingError: a value is outside its range.
    """

    word: ClassVar[str] = "pissa"
    paper: ClassVar[str] = (
        "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language "
        "Models, arXiv 2404.02948"
    )
    decides: ClassVar[Mapping[str, str]] = {"start": "the weight's principal singular triplets"}
    needs: ClassVar[frozenset[str]] = frozenset({WEIGHT})
    peft_start: ClassVar[str] = "pissa"
    remark: ClassVar[str] = (
        "It keeps a frozen copy of the start beside the pair: files hold rank 2r."
    )

    iterations: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        to_whole_number(self, "iterations", at_least=0, optional=True)

    def initial_factors(
        self, module: UnadaptedModule, rank: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        U, S, Vt = leading_triplets(module.wide_weight(), rank, self.iterations)
        root = (S / scale).sqrt()
        return U * root, root.unsqueeze(1) * Vt
