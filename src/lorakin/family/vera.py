"""VeRA: all layers share one frozen random pair, and each layer trains two vectors that scale it.

Paper:    "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454, equation 2.
Forward:  y = W0 x + b0 + b ⊙ (B (d ⊙ (A x̃)))        b0 is the layer's bias; no alpha, no alpha/r
Shapes:   A (r, largest in) and B (largest out, r) over all targets, shared; a layer uses A[:, :in]
          and B[:out]. Each layer has its own d (r) and b (out).
Trains:   b and d, r + out parameters per layer. The shared pair, r · (largest in + largest out)
          parameters, never trains.
Start:    A, B uniform with bounds √(6/largest in) and √(6/r); d = 0.1, b = 0
Draw:     one CPU generator with `seed` draws A, then B, row by row, and both are rounded to the
          base's dtype. This is PEFT's order, so its files that hold only the seed are read to the
          bit. A new widest layer changes all of B and most of A, so files keep both matrices, or
          with `save_projection=False` their widths and a checksum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lorakin.family.change import Chain
from lorakin.family.measure import UnadaptedModule
from lorakin.family.member import Parametrisation
from lorakin.family.pair import Shape, Tensors
from lorakin.family.settings import require, to_number, to_whole_number
from lorakin.family.slots import Slot, Slots


@dataclass(frozen=True)
class VeRA(Parametrisation):
    """VeRA: two trained vectors per layer around one random pair.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 6))
    >>> adapter = lk.adapt(model, lk.VeRA(rank=2), ["0", "1"])
    >>> sum(p.numel() for p in adapter.parameters() if p.requires_grad)  # (2 + 5) + (2 + 6)
    15

    Args:
        rank: rows of A, at least 1.
        seed: draws the shared pair.
        d_init: the start of d, not 0.
        dropout: probability of zeroing an entry of the branch's input, in [0, 1).
        save_projection: whether files hold the shared pair, or only what draws it again.

    Raises:
        SettingError: a value is outside its range.
    """

    word: ClassVar[str] = "vera"
    paper: ClassVar[str] = "VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454"
    decides: ClassVar[Mapping[str, str]] = {
        "parametrisation": "the change is diag(b)·B·diag(d)·A over one random pair for all layers",
        "projection": "A is frozen already",
    }
    learning_rate: ClassVar[float] = 2e-3
    remark: ClassVar[str] = (
        "It trains few parameters. Files also hold the frozen shared pair once, unless "
        "save_projection=false."
    )
    slots: ClassVar[Slots] = {
        "A": Slot(("rank", "inputs"), trained=False, shared=True, peft="base_model.vera_A"),
        "B": Slot(("outputs", "rank"), trained=False, shared=True, peft="base_model.vera_B"),
        "d": Slot(("rank",), decays=False, peft="vera_lambda_d"),
        "b": Slot(("outputs",), starts_at_zero=True, decays=False, peft="vera_lambda_b"),
    }
    test_settings: ClassVar[Mapping[str, Any]] = {"rank": 6}
    per_module: ClassVar[frozenset[str]] = frozenset()
    not_compared: ClassVar[frozenset[str]] = frozenset({"d_init", "save_projection"})

    rank: int = 256
    seed: int = 0
    d_init: float = 0.1
    dropout: float = 0.0
    save_projection: bool = True

    def __post_init__(self) -> None:
        to_whole_number(self, "rank", at_least=1)
        to_whole_number(self, "seed", at_least=0)
        to_number(self, "d_init", lambda d: d != 0 and math.isfinite(d), "a number other than 0")
        to_number(self, "dropout", lambda dropout: 0 <= dropout < 1, "a number in [0, 1)")
        require(
            isinstance(self.save_projection, bool),
            f"save_projection must be True or False, not {self.save_projection!r}",
        )

    @classmethod
    def comparable_settings(cls, rank: int, scaling: float, steps: int) -> dict[str, Any]:
        # Its ranks cost little, so it keeps its own rank. It has no alpha.
        return {"rank": None, "alpha": None}

    def check(self, shape: Shape, path: str) -> None:
        """Checks nothing: its rank may exceed the weight's sides, as the paper's does."""

    def start_all(
        self,
        modules: Mapping[str, UnadaptedModule],
        pairs: Mapping[str, Self],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> dict[str, Tensors]:
        if not modules:
            return {}
        A, B = self._draw(
            max(module.shape.inputs for module in modules.values()),
            max(module.shape.outputs for module in modules.values()),
            next(iter(modules.values())).weight.dtype,
            device,
        )
        return {
            path: {"A": A, "B": B, **self._vectors(module.shape, device)}
            for path, module in modules.items()
        }

    def _draw(
        self, inputs: int, outputs: int, base: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Returns the shared pair, A (r, inputs) and B (outputs, r), float32."""
        A = torch.empty(self.rank, inputs, device=device, dtype=torch.float32)
        B = torch.empty(outputs, self.rank, device=device, dtype=torch.float32)
        generator = None if A.is_meta else torch.Generator().manual_seed(self.seed)
        for matrix, fan_in in ((A, inputs), (B, self.rank)):
            bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan_in))
            matrix.uniform_(-bound, bound, generator=generator)
        return tuple(matrix.to(base).to(torch.float32) for matrix in (A, B))  # type: ignore[return-value]

    def _vectors(self, shape: Shape, device: torch.device) -> Tensors:
        """Returns the initial b (outputs,) and d (rank,) of one layer."""
        d = torch.full((self.rank,), self.d_init, device=device, dtype=torch.float32)
        return {"d": d, "b": torch.zeros(shape.outputs, device=device, dtype=torch.float32)}

    def change(self, tensors: Mapping[str, Tensor]) -> Chain:
        return Chain(outer=tensors["b"], up=tensors["B"], inner=tensors["d"], down=tensors["A"])
