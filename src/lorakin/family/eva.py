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

    def refusal_of_pair(self, pair_class: type[Parametrisation]) -> str | None:
        if _inner_factor(pair_class.slots) is None:
            return f"{pair_class.word} has no factor of its own on the inputs' side"
        return None

    @property
    def batches(self) -> int:
        return MOST_BATCHES

    def collector(
        self, modules: Mapping[str, UnadaptedModule], methods: Mapping[str, Method]
    ) -> DirectionCollector:
        asked = {p: m.parametrisation.rank for p, m in methods.items()}  # type: ignore[attr-defined]
        may_move = all("rank" in m.parametrisation.settings_of_modules() for m in methods.values())
        largest = {
            path: min(round(rank * self.rho) if may_move else rank, *modules[path].shape[:2])
            for path, rank in asked.items()
        }
        return DirectionCollector(asked, largest, self.tau)

    def settings_found(
        self, results: Mapping[str, Any], methods: Mapping[str, Method]
    ) -> dict[str, Mapping[str, Any] | None]:
        settings: dict[str, Mapping[str, Any] | None] = {}
        for path, method in methods.items():
            rank, asked = results[path].rank, method.parametrisation.rank  # type: ignore[attr-defined]
            if rank != asked:
                alpha = method.setting("alpha") * rank / asked
                settings[path] = {"rank": rank, "alpha": alpha} if rank else None
        return settings

    def amend_start(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        amended = dict(tensors)
        for path, of_module in tensors.items():
            slot = _inner_factor(methods[path].parametrisation.slots)
            directions: PrincipalDirections | None = modules[path].measured
            assert slot is not None
            if directions is not None:
                rows = _whitened(directions) if self.whiten else directions.V
                amended[path] = {**of_module, slot: rows.to(of_module[slot]).contiguous()}
        return amended


def _whitened(directions: PrincipalDirections) -> Tensor:
    """Returns V / √σ; directions along which nothing varies stay as they are."""
    sigma = directions.sigma
    varies = sigma > NOTHING * sigma.max()
    return directions.V / torch.where(varies, sigma, 1.0).sqrt().unsqueeze(1)


def _inner_factor(slots: Slots) -> str | None:
    """Returns the trained slot that multiplies the inputs: A, or AdaLoRA's Q; None if shared."""
    inner = (n for n, s in slots.items() if s.shape == ("rank", "inputs") and not s.shared)
    return next((name for name in inner if slots[name].trained), None)


class PrincipalDirections(NamedTuple):
    """What one module gets: its rank, σ (rank,) and V (rank, inputs)."""

    rank: int
    sigma: Tensor
    V: Tensor


class IncrementalSVD:
    """The leading k right singular vectors of the centred rows so far, in float64."""

    def __init__(self, components: int) -> None:
        self.k = components
        self.count = 0
        """M, the rows taken in so far."""
        self.total = 0.0
        """T, the sum of all squares of the centred rows."""
        self.mean = torch.zeros(0)
        self.V, self.sigma = torch.zeros(0, 0), torch.zeros(0)
        self.is_still = torch.zeros(components, dtype=torch.bool)
        """Which rows of V the last update did not move, (k,)."""
        self.waiting = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, rows: Tensor, tau: float) -> None:
        """Takes in rows (n, inputs); they wait until there are at least k of them."""
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
        if self.count:
            step = (self.count * n / (self.count + n)) ** 0.5 * (self.mean - mean)
            self.total += float(step.square().sum())
            centred = torch.cat([self.sigma.unsqueeze(1) * before, centred, step.unsqueeze(0)])
            mean = (self.count * self.mean + n * mean) / (self.count + n)

        sigma, V = leading_rows(centred, self.k)
        self.count, self.mean, self.sigma, self.V = self.count + n, mean, sigma, V
        if len(before):
            is_similar = torch.nn.functional.cosine_similarity(before, V, dim=1) >= tau
            varies = sigma > NOTHING * sigma[0]
            self.is_still = (is_similar | ~varies).cpu()

    def directions(self, rank: int) -> PrincipalDirections:
        """Returns the directions for a module that gets this rank."""
        return PrincipalDirections(rank, self.sigma[:rank], self.V[:rank])

    @property
    def ratios(self) -> Tensor:
        """ξ (k,), the share of all squares that each component explains."""
        return (self.sigma.square() / max(self.total, torch.finfo(torch.float64).tiny)).cpu()


class DirectionCollector:
    """Where the modules' inputs vary most, and the ranks that follow.

    Modules that get the same tensor, such as q, k and v, share one SVD.
    """

    def __init__(self, asked: Mapping[str, int], largest: Mapping[str, int], tau: float) -> None:
        self.asked, self.largest, self.tau = asked, largest, tau
        self.svds: dict[str, IncrementalSVD] = {}
        self.owners: dict[str, str] = {}
        """Path → the module whose SVD serves it."""
        self.ranks = dict(largest)
        self.batches = 0
        self.last: tuple[Tensor, str] | None = None
        """The inputs added last in the first batch, and the module whose SVD serves them."""

    def wants(self, path: str) -> bool:
        """Returns whether a direction that the ranks need still moves."""
        owner = self.owners.get(path)
        if owner is None:
            return True
        ranks = [rank for other, rank in self.ranks.items() if self.owners.get(other) == owner]
        return not bool(self.svds[owner].is_still[: max(ranks)].all())

    def add(self, path: str, measured: Tensor) -> None:
        """Takes in the inputs of one call; the first batch shows which modules share an input."""
        require(all_finite(measured), f"eva: the inputs of {path} hold NaN or infinity")
        if path not in self.owners:
            self.owners[path] = self._owner(path, measured)
            self.last = measured, self.owners[path]
        if self.owners[path] == path:
            self.svds.setdefault(path, IncrementalSVD(self.largest[path])).update(
                measured, self.tau
            )

    def _owner(self, path: str, inputs: Tensor) -> str:
        """Returns the module whose SVD serves this one: the last one, if it got the same tensor."""
        if self.last is not None:
            last_inputs, last_owner = self.last
            if last_inputs is inputs and self.largest[last_owner] == self.largest[path]:
                return last_owner
        return path

    def end_batch(self) -> bool:
        """Distributes the ranks again; returns whether all directions they need stand still."""
        self.batches, self.last = self.batches + 1, None
        if all(svd.count for svd in self.svds.values()):
            self.ranks = self._ranks_by_share()
        moving = [path for path in self.owners if self.wants(path)]
        if moving and self.batches == MOST_BATCHES:
            warnings.warn(
                f"eva: after {MOST_BATCHES} batches the directions of {some(moving)} still move; "
                "eva takes them as they are. Give larger batches, or a smaller tau",
                LorakinWarning,
                stacklevel=2,
            )
        return not moving or self.batches >= MOST_BATCHES

    def _ranks_by_share(self) -> dict[str, int]:
        """Returns the ranks when the Σ r ranks go to the largest ξ of all modules."""
        paths = [path for path in self.owners if path in self.asked]
        ratios = [self.svds[self.owners[path]].ratios[: self.largest[path]] for path in paths]
        sizes = [len(of_module) for of_module in ratios]
        best = torch.sort(torch.cat(ratios), descending=True, stable=True).indices
        kept = torch.zeros(sum(sizes), dtype=torch.bool)
        kept[best[: sum(self.asked.values())]] = True
        parts = torch.split(kept, sizes)
        return {path: int(part.sum()) for path, part in zip(paths, parts, strict=True)}

    def results(self) -> dict[str, PrincipalDirections]:
        """Returns path → its directions with σ, and the rank that it gets."""
        return {
            path: self.svds[owner].directions(self.ranks[path])
            for path, owner in self.owners.items()
        }
