"""OLoRA: the pair begins as the leading part of the weight's QR decomposition; B is orthonormal.

Paper:    "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775.
Forward:  y = W0 x + s · (B A − B_0 A_0) x + b
          The paper writes W0 − s·B_0·A_0 into the base. Here the base stays, and the frozen anchor
          B_0, A_0 takes the start away (`start.py`).
Shapes:   the pair's; the anchor has the same
Trains:   A and B, r · (in + out) parameters; the anchor has as many that do not train
Start:    W0 = Q R,  B = Q_r (the first r columns),  A = R_r (the first r rows)
QR:       in float32 at least, without pivoting. As in the paper's code nothing is divided by s, so
          alpha changes how much of the weight the pair begins with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakin.family.measure import WEIGHT, UnadaptedModule
from lorakin.family.start import AnchoredStart


@dataclass(frozen=True, kw_only=True)
class OLoRA(AnchoredStart):
    """OLoRA: starts the pair at the leading part of the weight's QR. Its settings are the pair's.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> adapter = lk.adapt(model, lk.OLoRA(rank=2), "0")
    >>> B = model[0].lorakin.default.B
    >>> torch.allclose(B.T @ B, torch.eye(2), atol=1e-5)
    True

    Raises:
        SettingError: a value is outside its range.
    """

    word: ClassVar[str] = "olora"
    paper: ClassVar[str] = (
        "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, arXiv 2406.01775"
    )
    decides: ClassVar[Mapping[str, str]] = {"start": "the leading part of the weight's QR"}
    needs: ClassVar[frozenset[str]] = frozenset({WEIGHT})
    peft_start: ClassVar[str] = "olora"
    remark: ClassVar[str] = (
        "It keeps a frozen copy of the start beside the pair: files hold rank 2r."
    )

    def initial_factors(
        self, module: UnadaptedModule, rank: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(module.wide_weight())
        return Q[:, :rank], R[:rank]
