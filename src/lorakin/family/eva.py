"""EVA: A begins where a module's inputs vary most, and ranks go where they explain most.

Paper:    "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170,
          algorithm 1; the details are those of the authors' code.
Forward:  the pair's
Shapes:   the pair's, at the new ranks
Trains:   what the pair trains, at the new ranks
Start:    A = V_{1..r} (r, in), the leading right singular vectors of the module's centred inputs;
          B = 0, so the model begins as the base
SVD:      incremental over batches X (tokens, in), with k = round(ρ·r) components σ, V and the mean
          μ of the M tokens before: the SVD of

              [diag(σ)·V ; X − mean(X) ; √(M·n/(M + n))·(μ − mean(X))]

          A row of V stands still when cos(v_before, v) ≥ τ. Batches are repeated until all rows
          that count stand still.
Ranks:    ξ_j = σ_j² / T is the share that component j explains, T the sum of all squares. The Σ r
          ranks of the adapter go to the largest ξ of all modules, at most k to each and perhaps
          none. alpha follows, so that alpha/r stays what it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lorakin.errors import LorakinWarning, some
from lorakin.family.linear_algebra import leading_rows
from lorakin.family.measure import INPUTS, UnadaptedModule
from lorakin.family.member import Parametrisation
from lorakin.family.pair import Tensors
from lorakin.family.precision import all_finite
from lorakin.family.settings import require, to_number
from lorakin.family.slots import Slots
from lorakin.family.start import Start

if TYPE_CHECKING:
    from lorakin.family.method import Method

NOTHING = 1e-6
"""The share of the largest σ up to which inputs count as not varying along a direction."""
MOST_BATCHES = 1000
"""After so many batches it takes the directions as they are, even if they still move."""


@dataclass(frozen=True, kw_only=True)
class EVA(Start):
    """EVA: starts A where the inputs vary most, and moves ranks between modules.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 5))
    >>> batches = [{"input": torch.randn(32, 6)} for _ in range(2)]
    >>> adapter = lk.adapt(model, lk.EVA(rank=2, tau=0.5), ["0", "1"], probe=batches)
    >>> sum(method.setting("rank") for method in adapter.placement.methods.values())
    4

    Args:
        rho: ρ, a module gets at most rho times its rank; at least 1, which keeps all ranks.
        tau: τ, how similar a direction must be in two batches to stand still, in [0, 1].
        whiten: divide each direction by √σ.

    Raises:
        SettingError: a value is outside its range.
    """

    word: ClassVar[str] = "eva"
    paper: ClassVar[str] = (
        "Parameter Efficient Fine-tuning via Explained Variance Adaptation, arXiv 2410.07170"
    )
    decides: ClassVar[Mapping[str, str]] = {"start": "what the module's inputs vary along most"}
    needs: ClassVar[frozenset[str]] = frozenset({INPUTS})
    peft_start: ClassVar[str] = "eva"
    remark: ClassVar[str] = "It measures the inputs of some batches first."

    rho: float = 2.0
    tau: float = 0.99
    whiten: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        to_number(self, "rho", lambda rho: 1 <= rho < float("inf"), "a number ≥ 1")
        to_number(self, "tau", lambda tau: 0 <= tau <= 1, "a number in [0, 1]")
        require(isinstance(self.whiten, bool), f"whiten must be True or False, not {self.whiten!r}")

    def refusal_of_pair(self, parametrisation: type[Parametrisation]) -> str | None:
        if inner_factor(parametrisation.slots) is None:
            return f"{parametrisation.word} has no factor of its own on the inputs' side"
        return None

    def collector(
        self, modules: Mapping[str, UnadaptedModule], methods: Mapping[str, Method]
    ) -> Directions:
        shares = {p: m.parametrisation.rank for p, m in methods.items()}  # type: ignore[attr-defined]
        moves = all("rank" in m.parametrisation.settings_of_modules() for m in methods.values())
        most = {
            path: min(round(rank * self.rho) if moves else rank, *modules[path].shape[:2])
            for path, rank in shares.items()
        }
        return Directions(shares, most, self.tau)

    def settings_found(
        self, found: Mapping[str, Any], methods: Mapping[str, Method]
    ) -> dict[str, Mapping[str, Any] | None]:
        settings: dict[str, Mapping[str, Any] | None] = {}
        for path, method in methods.items():
            rank, before = found[path].rank, method.parametrisation.rank  # type: ignore[attr-defined]
            if rank != before:
                alpha = method.setting("alpha") * rank / before
                settings[path] = {"rank": rank, "alpha": alpha} if rank else None
        return settings

    def amend_start(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        begun = {}
        for path, there in tensors.items():
            name, seen = inner_factor(methods[path].parametrisation.slots), modules[path].measured
            assert name is not None
            begun[path] = there
            if seen is not None:
                rows = whitened(seen) if self.whiten else seen.V
                begun[path] = {**there, name: rows.to(there[name]).contiguous()}
        return begun


def whitened(found: Found) -> Tensor:
    """V / √σ; directions along which nothing varies stay as they are."""
    varies = found.sigma > NOTHING * found.sigma.max()
    return found.V / torch.where(varies, found.sigma, 1.0).sqrt().unsqueeze(1)


def inner_factor(slots: Slots) -> str | None:
    """The trained slot that multiplies the inputs: A, or AdaLoRA's Q; None if it is shared."""
    inner = (n for n, s in slots.items() if s.shape == ("rank", "inputs") and not s.shared)
    return next((name for name in inner if slots[name].trained), None)


class Found(NamedTuple):
    """What one module gets: its rank, σ (rank,) and V (rank, inputs)."""

    rank: int
    sigma: Tensor
    V: Tensor


class IncrementalSVD:
    """The leading k right singular vectors of the centred rows so far, in float64."""

    def __init__(self, components: int) -> None:
        self.k = components
        self.seen, self.total, self.mean = 0, 0.0, torch.zeros(0)
        self.V, self.sigma = torch.zeros(0, 0), torch.zeros(0)
        self.still = torch.zeros(components, dtype=torch.bool)
        self.waiting = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, rows: Tensor, tau: float) -> None:
        """Take in rows (n, inputs); they wait until there are at least k of them."""
        rows = rows.double()
        if len(self.waiting):
            rows = torch.cat([self.waiting.to(rows.device), rows])
        n = len(rows)
        if n < self.k:
            self.waiting = rows
            return
        self.waiting = rows[:0]

        mean, before = rows.mean(0), self.V
        centred = rows - mean
        self.total += float(centred.square().sum())
        if self.seen:
            step = (self.seen * n / (self.seen + n)) ** 0.5 * (self.mean - mean)
            self.total += float(step.square().sum())
            centred = torch.cat([self.sigma.unsqueeze(1) * before, centred, step.unsqueeze(0)])
            mean = (self.seen * self.mean + n * mean) / (self.seen + n)

        sigma, V = leading_rows(centred, self.k)
        self.seen, self.mean, self.sigma, self.V = self.seen + n, mean, sigma, V
        if len(before):
            alike = torch.nn.functional.cosine_similarity(before, V, dim=1) >= tau
            nothing = sigma <= NOTHING * sigma[0]  # the inputs do not vary in these directions
            self.still = (alike | nothing).cpu()

    def at(self, rank: int) -> Found:
        """The directions for a module that gets this rank."""
        return Found(rank, self.sigma[:rank], self.V[:rank])

    @property
    def ratios(self) -> Tensor:
        """ξ (k,), the share of all squares that each component explains."""
        return (self.sigma.square() / max(self.total, torch.finfo(torch.float64).tiny)).cpu()


class Directions:
    """Where the modules' inputs vary most, and the ranks that follow.

    Modules that get the same tensor, such as q, k and v, share one SVD.
    """

    def __init__(self, shares: Mapping[str, int], most: Mapping[str, int], tau: float) -> None:
        self.shares, self.most, self.tau = shares, most, tau
        self.svds: dict[str, IncrementalSVD] = {}
        self.owners: dict[str, str] = {}
        """Path → the module whose SVD serves it."""
        self.ranks = dict(most)
        self.batches = 0
        self.last: tuple[Tensor, str] | None = None

    def wants(self, path: str) -> bool:
        """Whether a direction that the ranks need still moves."""
        owner = self.owners.get(path)
        if owner is None:
            return True
        needed = max(rank for at, rank in self.ranks.items() if self.owners.get(at) == owner)
        return not bool(self.svds[owner].still[:needed].all())

    def add(self, path: str, seen: Tensor) -> None:
        """Take in the inputs of one call; the first batch shows which modules share an input."""
        require(all_finite(seen), f"eva: the inputs of {path} hold NaN or infinity")
        if path not in self.owners:
            self.owners[path] = self._owner(path, seen)
            self.last = seen, self.owners[path]
        if self.owners[path] == path:
            self.svds.setdefault(path, IncrementalSVD(self.most[path])).update(seen, self.tau)

    def _owner(self, path: str, seen: Tensor) -> str:
        """The module whose SVD serves this one: the last one, if it saw the same tensor."""
        shares = self.last is not None and self.last[0] is seen
        if shares and self.last is not None and self.most[self.last[1]] == self.most[path]:
            return self.last[1]
        return path

    def end_batch(self) -> bool:
        """Shares the ranks out again; returns whether all directions they need stand still."""
        self.batches, self.last = self.batches + 1, None
        if all(svd.seen for svd in self.svds.values()):
            self.ranks = self._given_out()
        moving = [path for path in self.owners if self.wants(path)]
        if moving and self.batches == MOST_BATCHES:
            warnings.warn(
                f"eva: after {MOST_BATCHES} batches the directions of {some(moving)} still move; "
                "eva takes them as they are. Give larger batches, or a smaller tau",
                LorakinWarning,
                stacklevel=2,
            )
        return not moving or self.batches >= MOST_BATCHES

    def _given_out(self) -> dict[str, int]:
        """The Σ r ranks, given to the largest ξ of all modules."""
        paths = [path for path in self.owners if path in self.shares]
        ratios = [self.svds[self.owners[path]].ratios[: self.most[path]] for path in paths]
        sizes = [len(each) for each in ratios]
        best = torch.sort(torch.cat(ratios), descending=True, stable=True).indices
        kept = torch.zeros(sum(sizes), dtype=torch.bool)
        kept[best[: sum(self.shares.values())]] = True
        parts = torch.split(kept, sizes)
        return {path: int(of.sum()) for path, of in zip(paths, parts, strict=True)}

    def results(self) -> dict[str, Found]:
        """Path → its directions with σ, and the rank that it gets."""
        return {path: self.svds[owner].at(self.ranks[path]) for path, owner in self.owners.items()}
