"""Several changes of one weight become one: a weighted sum, perhaps after dropping entries.

Papers:   "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708;
          "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
          Lunch" (DARE), arXiv 2311.03099. The words are PEFT's.

For changes D_k (outputs, inputs) with weights w_k, entry by entry:

    sum               Σ w_k · D_k
    magnitude_prune   Σ w_k · T_k            T_k: the `density` · numel largest of D_k, else 0
    dare_linear       Σ w_k · R_k            R_k: D_k / density with probability `density`, else 0
    ties              Σ w_k · T_k / count    over the `count` k whose T_k has the elected sign
    dare_ties         the same with R_k

The elected sign is that of Σ T_k (`total`) or of Σ sign T_k (`frequency`), + where that is 0;
weights take no part in the election. All but the sum have full rank, whatever the changes' ranks;
`low_rank.nearest_to` makes a pair of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorakin.errors import SettingError
from lorakin.family.pair import Pair
from lorakin.family.settings import did_you_mean, one_of, require, to_number, to_whole_number
from lorakin.family.weight import BLOCK

RowReader = Callable[[slice], Tensor]
"""A matrix that is formed some rows at a time."""


class Kind(NamedTuple):
    """Which entries of each change are dropped before the sum, and whether signs are elected."""

    drops: str = ""
    """Which entries: the `small` ones, or by `chance`; none if empty."""
    elects: bool = False


KINDS = {
    "sum": Kind(),
    "ties": Kind("small", True),
    "magnitude_prune": Kind("small"),
    "dare_linear": Kind("chance"),
    "dare_ties": Kind("chance", True),
}
OPERANDS = ("change", "factors")
"""What is combined: the product of each pair, or A and B separately."""
PEFT_WORDS = {
    "cat": 'how="sum"',
    "linear": 'how="sum", on="factors"',
    "svd": 'how="sum", rank=…',
} | {f"{how}_svd": f'how="{how}", rank=…' for how in KINDS if how != "sum"}
"""PEFT's other words for combinations, and what to write here."""


@dataclasses.dataclass(frozen=True)
class Combination:
    """How several changes become one.

    >>> import torch
    >>> one, two = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 3.0]])
    >>> ties = Combination(how="ties", density=1.0)
    >>> ties.of_matrices([one, two], [1, 1], ties.generator())
    tensor([[1.5000, 3.0000]])

    Args:
        how: `sum`, `ties`, `magnitude_prune`, `dare_linear` or `dare_ties`; the module's docstring
            has their formulas.
        on: `change`, the product of each pair; or `factors`, A and B separately, as PEFT's words
            without `_svd` do.
        density: the share of entries to keep, in (0, 1]; needed by all but the sum.
        elect: how signs are elected, by `total` (the default) or `frequency`.
        seed: of the entries that DARE draws, on the CPU; 0 by default.

    Raises:
        SettingError: an unknown word, a value outside its range, or a setting that `how` ignores.
    """

    how: str = "sum"
    on: str = "change"
    density: float | None = None
    elect: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.how, str) or self.how not in KINDS:
            raise SettingError(_unknown(self.how))
        one_of(self, "on", OPERANDS)
        to_number(
            self,
            "density",
            lambda share: 0 < share <= 1,
            "a number in (0, 1], the share of entries kept",
            optional=True,
        )
        to_whole_number(self, "seed", at_least=0, optional=True)
        if self.elect is not None:
            one_of(self, "elect", ("total", "frequency"))
        kind = KINDS[self.how]
        uses = {"density": bool(kind.drops), "elect": kind.elects, "seed": kind.drops == "chance"}
        for name, used in uses.items():
            require(
                used or getattr(self, name) is None,
                f"how={self.how!r} does not use {name}; leave it out",
            )
        require(
            not kind.drops or self.density is not None,
            f"how={self.how!r} keeps a share of each change's entries: give density, such as "
            "density=0.5",
        )

    @property
    def is_low_rank(self) -> bool:
        """Whether a pair holds the result exactly.

        Its rank is the sum of the ranks or, with `on="factors"`, the rank of each.
        """
        return self.how == "sum" or self.on == "factors"

    def generator(self) -> torch.Generator:
        """Returns the generator from which DARE draws for all matrices in turn."""
        return torch.Generator().manual_seed(self.seed or 0)

    def of_pairs(
        self, pairs: Sequence[Pair], weights: Sequence[float], generator: torch.Generator
    ) -> Tensor:
        """Returns the combined change (outputs, inputs) of pairs without gains, of any ranks."""
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
        """Returns A and B combined separately.

        As in PEFT, each factor takes the root of |weight · scale|, and A its sign, so that the
        product of a pair takes weight · scale.

        Args:
            pairs: the factors before their scale, all of one rank.
            scales: one per pair.
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
        """Returns the combination of matrices of one shape."""
        readers = [matrix.__getitem__ for matrix in matrices]
        outputs, inputs = matrices[0].shape
        return self.of_rows(readers, weights, (outputs, inputs), matrices[0], generator)

    def of_rows(
        self,
        parts: Sequence[RowReader],
        weights: Sequence[float],
        shape: tuple[int, int],
        like: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Returns the combination of matrices that are formed some rows at a time.

        Only the result, one mask per matrix and, while masks are made, one matrix are whole.
        """
        if 0 in shape:
            return like.new_zeros(shape)
        kind, step = KINDS[self.how], max(1, BLOCK // shape[1])
        spans = [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
        density = 1.0 if self.density is None else self.density
        masks: list[Tensor] = []
        if density < 1:
            masks = [self._mask(part, spans, shape, like, generator) for part in parts]
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
        part: RowReader,
        spans: Sequence[slice],
        shape: tuple[int, int],
        like: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Returns which entries of a matrix are kept, (outputs, inputs), as booleans.

        Entries that equal the smallest one kept are kept too.
        """
        assert self.density is not None
        if KINDS[self.how].drops == "chance":
            masks = [
                torch.bernoulli(
                    torch.full((s.stop - s.start, shape[1]), self.density, dtype=like.dtype),
                    generator=generator,
                )
                for s in spans
            ]
            return torch.cat(masks).bool().to(like.device)
        sizes = torch.cat([part(span).abs() for span in spans])
        kept_count = max(1, int(self.density * sizes.numel()))
        smallest_kept: Tensor = sizes.flatten().kthvalue(sizes.numel() - kept_count + 1).values
        return sizes >= smallest_kept


def _product(pair: Pair) -> RowReader:
    """Returns a reader of the rows of a pair's up·down."""
    return lambda span: pair.up[span] @ pair.down


def _unknown(how: object) -> str:
    """Returns the message for an unknown `how`."""
    if isinstance(how, str) and how in PEFT_WORDS:
        return f"how={how!r} is PEFT's word; here it is {PEFT_WORDS[how]}"
    hint = did_you_mean(str(how), KINDS)
    return f"unknown how={how!r}{hint}; there are: {', '.join(KINDS)}"
