"""DoRA: split the weight into lengths and directions; m trains lengths, the pair directions.

Paper:    "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equation 5; section 4.3
          makes the norm a constant.
Forward:  V = W0 + up·down,  n_j = ‖V_j‖ (row j),  g = m / n

              y = W0 x + (g − 1) ⊙ (W0 x̃) + g ⊙ up(down x̃) + b       without dropout: g ⊙ (V x) + b

          Dropout acts on both terms that the adapter adds, the gain's over W0 and the pair's.
Shapes:   m, n, g (out): one entry per *output*, as in the authors' code
Trains:   what the pair trains, and m: `out` more parameters, which never decay
Start:    m = n, computed by the same function, so g is exactly 1. A row of length zero has gain 1
          for good; nothing is divided by it.
Gradient: n is a constant: ∂up = (g ⊙ G) downᵀ, ∂down = upᵀ (g ⊙ G), ∂m_j = ⟨G_j, V_j⟩ / n_j, with
          G = ∂W
Norm:     in float32 at least. CPUs do not form V where that is accurate:

              n_j² = ‖w_j‖² + 2 · up_j · (down w_jᵀ) + up_j (down downᵀ) up_jᵀ

          A row that the pair nearly cancels is measured directly. GPUs would have to wait to learn
          which rows these are: there a kernel forms V block by block (kernels/triton_gain.py), or
          torch forms it in the dtype of W0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lorakin.family.measure import WEIGHT, UnadaptedModule
from lorakin.family.member import Modifier
from lorakin.family.pair import ScaledPair, Tensors
from lorakin.family.precision import wide_dtype
from lorakin.family.rule import AdaptedModule
from lorakin.family.sharding import is_sharded
from lorakin.family.slots import Slot, Slots
from lorakin.family.weight import FrozenWeight

if TYPE_CHECKING:
    from lorakin.family.method import Method

CANCELLED = 1e-3
"""If n² is below this share of its terms, too many digits cancelled; narrow dtypes allow less."""


@dataclass(frozen=True, kw_only=True)
class DoRA(Modifier):
    """DoRA: a trained length per output over any pair. Its settings are the pair's.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> adapter = lk.adapt(model, lk.DoRA(rank=2), "0")
    >>> magnitude = model[0].lorakin.default.m
    >>> torch.equal(magnitude, model[0].weight.norm(dim=1))
    True

    Raises:
        SettingError: a value is outside its range.
    """

    word: ClassVar[str] = "dora"
    paper: ClassVar[str] = "DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353"
    decides: ClassVar[Mapping[str, str]] = {"gain": "a trained length for each output"}
    slots: ClassVar[Slots] = {
        "m": Slot(("outputs",), decays=False, belongs_to_pair=False, peft="lora_magnitude_vector")
    }
    needs: ClassVar[frozenset[str]] = frozenset({WEIGHT})
    learning_rate_factor: ClassVar[float] = 0.5
    remark: ClassVar[str] = "Serves as PEFT's DoRA or merged; as a plain pair only approximately."

    def amend_start(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        amended = {}
        for path, of_module in tensors.items():
            shape, weight, _ = modules[path]
            on_device = {slot: t.to(weight.device) for slot, t in of_module.items()}
            pair = methods[path].low_rank(on_device, shape)
            amended[path] = {**of_module, "m": row_norms(weight, pair.up, pair.down)}
        return amended

    def gain(
        self, change: ScaledPair, tensors: Mapping[str, Tensor], weight: Tensor | FrozenWeight
    ) -> Tensor:
        (up, down, _), scale = change
        m, n = tensors["m"], row_norms(weight, up, down, scale)
        is_zero = n == 0
        return (m / n.masked_fill_(is_zero, 1)).masked_fill_(is_zero, 1)

    def unmoved(self, modules: Sequence[AdaptedModule]) -> str | None:
        at_start = [module.path for module in modules if _is_at_start(module)]
        if not at_start:
            return None
        return (
            f"the magnitudes of {len(at_start)} of {len(modules)} modules ({at_start[0]}, …) still "
            "equal the base's row norms exactly: training never reached them"
        )


def _is_at_start(module: AdaptedModule) -> bool:
    """Returns whether the magnitudes still equal the base's row norms."""
    m, weight = module.tensors()["m"], module.weight
    if is_sharded(weight):  # this process only knows some of its rows
        return False
    nothing = m.new_zeros(weight.shape[0], 1), m.new_zeros(1, weight.shape[1])
    return not m.is_meta and torch.equal(m, row_norms(weight, *nothing).to(m))


@torch.no_grad()
def row_norms(
    weight: Tensor | FrozenWeight, up: Tensor, down: Tensor, scale: float = 1.0
) -> Tensor:
    """Returns ‖w_j + scale·up_j·down‖ of every row j, (out,), as a constant.

    Args:
        weight: (out, in), any floating dtype. A `FrozenWeight`, which training keeps, remembers
            ‖w_j‖² and rounds `down` to the weight's dtype before multiplying, as the forward does.
        up: (out, k).
        down: (k, in).
        scale: a factor of the product.

    Returns:
        The norms, in the widest dtype of weight and pair, at least float32.
    """
    matrix = FrozenWeight(weight) if isinstance(weight, Tensor) else weight
    dtype = wide_dtype(torch.promote_types(up.dtype, matrix.dtype))
    if matrix.device.type == "meta":
        return torch.empty(matrix.shape[0], dtype=dtype, device=matrix.device)
    with torch.autocast(matrix.device.type, enabled=False):
        # Choosing rows by their values would break a compiler's graph, and wait for a GPU.
        if torch.compiler.is_compiling() or matrix.device.type != "cpu":
            return matrix.changed_row_norms(up, down, scale)

        up, down = scale * up.to(dtype), down.to(dtype)
        base_squares = matrix.squares
        if isinstance(weight, Tensor):
            cross = torch.cat([rows.to(dtype) @ down.T for rows in matrix.blocks()])
        else:
            cross = matrix.product(down)
        added = (torch.addmm(cross.to(dtype), up, down @ down.T, beta=2) * up).sum(1)
        squares = base_squares + added
        norms = squares.clamp(min=0).sqrt()

        # The formula is inaccurate where the pair nearly cancels the row.
        least_share = max(CANCELLED, 16 * torch.finfo(cross.dtype).eps)
        if (cancelled := squares < 2 * least_share * base_squares).any():
            norms[cancelled] = torch.linalg.vector_norm(
                matrix.rows(cancelled).to(dtype) + up[cancelled] @ down, dim=1
            )
        return norms
