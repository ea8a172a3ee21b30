"""Several changes of one weight as one: their weighted sum, perhaps with entries dropped and signs elected before.

Papers:   "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708;
          "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch" (DARE),
          arXiv 2311.03099. The words are PEFT's.
Of changes D_k (outputs, inputs) with weights w_k, each entry by itself:

    sum               Σ w_k · D_k
    magnitude_prune   Σ w_k · T_k                  T_k: D_k with its `density` · numel largest entries, 0 elsewhere
    dare_linear       Σ w_k · R_k                  R_k: each entry of D_k / density with probability `density`, else 0
    ties              Σ w_k · T_k / count          over the k whose entry of T_k has the elected sign, `count` of them
    dare_ties         the same of R_k

The elected sign is that of Σ T_k (`total`) or of Σ sign T_k (`frequency`), + where that is 0; the weights take no part in it.
All but the sum are of full rank, whatever the ranks of the changes; `low_rank.nearest_to` is what makes a pair of them.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakin.errors import SettingError
from lorakin.family.pair import BLOCK, Pair
from lorakin.family.settings import number, one_of, require, whole_number

Rows = Callable[[slice], Tensor]
"""A matrix of which only some rows are formed at a time."""


class Kind(NamedTuple):
    """What is done to each change before they are added, and whether they vote on the sign."""

    drops: str = ""
    """Which entries: `small` ones, or by `chance`; none if empty."""
    elects: bool = False


KINDS = {
    "sum": Kind(),
    "ties": Kind("small", True),
    "magnitude_prune": Kind("small"),
    "dare_linear": Kind("chance"),
    "dare_ties": Kind("chance", True),
}
SPACES = ("change", "factors")
PEFTS = {"cat": 'how="sum"', "linear": 'how="sum", on="factors"', "svd": 'how="sum", rank=…'} | {
    f"{how}_svd": f'how="{how}", rank=…' for how in KINDS if how != "sum"
}
"""What PEFT's other words for a combination are here."""


@dataclasses.dataclass(frozen=True)
class Combination:
    """How changes become one.

    Args:
        how: see above.
        on: `change`, the product of each pair; or `factors`, A and B each by itself, as PEFT's words without `_svd`.
        density: the share of entries that is kept, in (0, 1]; needed by all but the sum.
        elect: how signs are elected, `total` (the default) or `frequency`.
        seed: of what DARE draws, on the CPU; 0 by default.

    Raises:
        SettingError: an unknown word, a value outside its range, or a setting that `how` does not use.
    """

    how: str = "sum"
    on: str = "change"
    density: float | None = None
    elect: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.how, str) or self.how not in KINDS:
            raise SettingError(_unknown(self.how))
        one_of(self, "on", SPACES)
        number(
            self,
            "density",
            lambda share: 0 < share <= 1,
            "a number in (0, 1], the share of entries kept",
            optional=True,
        )
        whole_number(self, "seed", at_least=0, optional=True)
        if self.elect is not None:
            one_of(self, "elect", ("total", "frequency"))
        kind = KINDS[self.how]
        uses = {"density": bool(kind.drops), "elect": kind.elects, "seed": kind.drops == "chance"}
        for name, used in uses.items():
            require(
                used or getattr(self, name) is None,
                f"how={self.how!r} uses no {name}; leave {name} out",
            )
        needed = f"how={self.how!r} keeps a share of each change's entries: give density, such as density=0.5"
        require(not kind.drops or self.density is not None, needed)

    @property
    def is_low_rank(self) -> bool:
        """Whether a pair holds the result exactly, its rank the sum of the ranks or, of factors, the rank of each."""
        return self.how == "sum" or self.on == "factors"

    def generator(self) -> torch.Generator:
        """What DARE draws from, for all matrices in turn."""
        return torch.Generator().manual_seed(self.seed or 0)

    def of_pairs(
        self, pairs: Sequence[Pair], weights: Sequence[float], generator: torch.Generator
    ) -> Tensor:
        """The combined change (outputs, inputs) of pairs without gains, which may be of different ranks."""
        shape = len(pairs[0].up), pairs[0].down.shape[1]
        return self.of_rows(
            [_product(pair) for pair in pairs], weights, shape, pairs[0].up, generator
        )

    def of_factors(
        self,
        pairs: Sequence[Pair],
        scales: Sequence[float],
        weights: Sequence[float],
        generator: torch.Generator,
    ) -> Pair:
        """A and B combined each by itself: half of weight · scale goes into each, as its root, and its sign into A.

        Args:
            pairs: the factors before their scale, all of one rank.
            scales: by pair.
        """
        roots = [abs(weight * scale) ** 0.5 for weight, scale in zip(weights, scales, strict=True)]
        signed = [
            root if weight * scale >= 0 else -root
            for root, weight, scale in zip(roots, weights, scales, strict=True)
        ]
        down = self.of_matrices([pair.down for pair in pairs], signed, generator)
        return Pair(self.of_matrices([pair.up for pair in pairs], roots, generator), down)

    def of_matrices(
        self, matrices: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator
    ) -> Tensor:
        """The same of matrices of one shape."""
        one = matrices[0]
        return self.of_rows(
            [matrix.__getitem__ for matrix in matrices],
            weights,
            (one.shape[0], one.shape[1]),
            one,
            generator,
        )

    def of_rows(
        self,
        parts: Sequence[Rows],
        weights: Sequence[float],
        shape: tuple[int, int],
        like: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """The same, rows by rows: beside the result, whole are a mask of each part and, at first, one part at a time."""
        if 0 in shape:
            return like.new_zeros(shape)
        kind, step = KINDS[self.how], max(1, BLOCK // shape[1])
        spans = [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
        density = 1.0 if self.density is None else self.density
        masks = (
            [self._mask(part, spans, shape, like, generator) for part in parts]
            if density < 1
            else []
        )
        factors = torch.tensor(list(weights), device=like.device, dtype=like.dtype).view(-1, 1, 1)
        out = []
        for span in spans:
            stack = torch.stack([part(span) for part in parts])
            if masks:
                stack = stack * torch.stack([mask[span] for mask in masks])
            if kind.drops == "chance":
                stack = stack / density
            if not kind.elects:
                out.append((factors * stack).sum(0))
                continue
            votes = (stack.sign() if self.elect == "frequency" else stack).sum(0)
            agree = stack.sign() == torch.where(votes >= 0, 1, -1)
            out.append((factors * stack * agree).sum(0) / agree.sum(0).clamp(min=1))
        return torch.cat(out)

    def _mask(
        self,
        part: Rows,
        spans: Sequence[slice],
        shape: tuple[int, int],
        like: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Which entries of a part are kept, (outputs, inputs). Entries as large as the smallest that is kept are kept too."""
        assert self.density is not None
        if KINDS[self.how].drops == "chance":
            drawn = [
                torch.bernoulli(
                    torch.full((s.stop - s.start, shape[1]), self.density, dtype=like.dtype),
                    generator=generator,
                )
                for s in spans
            ]
            return torch.cat(drawn).bool().to(like.device)
        sizes = torch.cat([part(span).abs() for span in spans])
        kept = max(1, int(self.density * sizes.numel()))
        least: Tensor = sizes.flatten().kthvalue(sizes.numel() - kept + 1).values
        return sizes >= least


def _product(pair: Pair) -> Rows:
    return lambda span: pair.up[span] @ pair.down


def _unknown(how: object) -> str:
    if isinstance(how, str) and how in PEFTS:
        return f"how={how!r} is PEFT's word; here it is {PEFTS[how]}"
    near = difflib.get_close_matches(str(how).lower(), KINDS, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown how={how!r}{meant}; there are: {', '.join(KINDS)}"
