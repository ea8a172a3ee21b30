"""OLoRA: the pair begins as the leading part of the weight's QR decomposition, an orthonormal B.

Paper:    "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775.
Start:    W0 = Q R,  B = Q_r (the first r columns),  A = R_r (the first r rows)
Forward:  y = W0 x + s · (B A − B_0 A_0) x + b        the paper writes W0 − s·B_0·A_0 into the base; here
          the base stays, and the frozen B_0, A_0 take the start away (`start.py`)
Trains:   A and B, r · (in + out) numbers; the anchor has as many that do not train
QR:       in float32 at least, without pivoting; not divided by s, so that alpha changes how much of the
          weight the pair begins as, as in the paper's code
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakin.family.measure import WEIGHT, Target
from lorakin.family.start import AnchoredStart, matrix_of


@dataclass(frozen=True, kw_only=True)
class OLoRA(AnchoredStart):
    """OLoRA. Its settings are the pair's.

    Raises:
        SettingError: a value outside its range.
    """

    word: ClassVar[str] = "olora"
    paper: ClassVar[str] = (
        "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, arXiv 2406.01775"
    )
    decides: ClassVar[Mapping[str, str]] = {"start": "the leading part of the weight's QR"}
    needs: ClassVar[frozenset[str]] = frozenset({WEIGHT})
    peft_start: ClassVar[str] = "olora"
    remark: ClassVar[str] = (
        "A frozen copy of the start is kept beside the pair: files hold rank 2r."
    )

    def factors(self, target: Target, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(matrix_of(target))
        return Q[:, :rank], R[:rank]
