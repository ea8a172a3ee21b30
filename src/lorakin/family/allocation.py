"""AdaLoRA's training rule: the regulariser, the scores, the budget, and the freeing of ranks.

`adalora.py` has the equations; this file has what happens at each optimizer step:

    before(n)   add the regulariser's gradient, then take the gradients into the scores
    after(n)    keep the b(n) best triplets, zero the others; at the end free them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.sharding import several_processes
from lorakin.family.slots import rank_factors, rank_switch


@dataclass(frozen=True)
class RankSchedule:
    """How many ranks each step allows, and how they are scored."""

    target_rank: int
    """The average rank of a matrix at the end."""
    total_steps: int
    """T, the optimizer steps of the run."""
    start: int
    """t_i, the steps before pruning begins."""
    end: int
    """T − t_f, the step after which the ranks are fixed."""
    interval: int
    """ΔT, the steps between two prunings."""
    beta1: float
    beta2: float
    orthogonality: float
    """γ, the weight of the regulariser."""

    def budget(self, n: int, ranks: int, target: int) -> int:
        """b(n): how many of `ranks` may keep their λ after step n; `target` of them stay."""
        if n <= self.start:
            return ranks
        if n >= self.end:
            return target
        left, all_of_it = (self.end - n) ** 3, (self.end - self.start) ** 3
        return target + (ranks - target) * left // all_of_it  # whole numbers: no rounding


class Matrix:
    """One P·Λ·Q of the budget. Several modules may share it; `module` is the first of them."""

    def __init__(self, module: AdaptedModule) -> None:
        self.module = module
        slots = module.method.parametrisation.slots
        scales = rank_switch(slots)
        assert scales is not None
        self.scales = scales
        self.sides = rank_factors(slots)
        """P and Q, and the axis along which each holds its ranks."""
        self.trained = tuple(slot for slot in (scales, *self.sides) if module.trains(slot))

    def factors(self) -> dict[str, nn.Parameter]:
        """Λ and the trained ones of P and Q, by slot; nothing once all triplets are gone."""
        tensors = self.module.tensors()
        return {slot: tensors[slot] for slot in self.trained if tensors[slot].numel()}

    @property
    def axes(self) -> dict[str, int]:
        """Each of its tensors, and the axis along which that holds the triplets."""
        return {self.scales: 0, **self.sides}

    @property
    def rank(self) -> int:
        """The number of triplets, pruned ones included until they are freed."""
        return len(self.module.tensors()[self.scales])


class Allocation(Rule):
    """Scores triplets before each step, keeps the best after it, and frees the rest at the end."""

    def __init__(self, schedule: RankSchedule, modules: Sequence[AdaptedModule]) -> None:
        self.schedule = schedule
        shared: dict[int, Matrix] = {}
        for module in modules:
            matrix = Matrix(module)
            shared.setdefault(id(module.tensors()[matrix.scales]), matrix)
        self.matrices = [matrix for matrix in shared.values() if matrix.scales in matrix.trained]
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        self.pattern: list[Tensor] | None = None
        """For each matrix, which triplets are kept (rank,); None before the first pruning."""
        self.all = sum(matrix.rank for matrix in self.matrices)
        self.target = min(self.all, len(self.matrices) * schedule.target_rank)
        self.freed = False
        self.scores_were_equal = False
        """Whether the last scores were all equal, so that they decided nothing."""

    def budget(self, n: int) -> int:
        """b(n): how many triplets may keep their λ after step n."""
        return self.schedule.budget(n, self.all, self.target)

    @torch.no_grad()
    def before(self, n: int) -> None:
        fixed = n > self.schedule.end and not self.freed
        self.regularise(self.pattern if fixed else None)
        if n <= self.schedule.end:
            self.update_scores()

    def regularise(self, pattern: list[Tensor] | None = None) -> None:
        """Add the exact gradient of γ·R: ∂P += γ · 2P(PᵀP − I)/‖PᵀP − I‖ / count; likewise for Q.

        With a `pattern`, I has ones for the kept triplets only; all else of the others is zero.
        """
        kept = pattern or [torch.ones(matrix.rank, dtype=torch.bool) for matrix in self.matrices]
        sides = [
            (factor, k)
            for matrix, k in zip(self.matrices, kept, strict=True)
            if k.any()
            for slot, factor in matrix.factors().items()
            if slot != matrix.scales
        ]
        reached = [(side, k) for side, k in sides if side.grad is not None]
        if not reached:
            return

        # The Gram matrix over the ranks, which are the smaller dimension.
        wide = [side.to(torch.promote_types(side.dtype, torch.float32)) for side, _ in reached]
        excess = [side.T @ side if _is_tall(side) else side @ side.T for side in wide]
        for gram, (_, k) in zip(excess, reached, strict=True):
            gram.diagonal().sub_(k.to(gram))
        sizes = [
            size.clamp(min=torch.finfo(size.dtype).tiny) for size in torch._foreach_norm(excess)
        ]
        torch._foreach_mul_(excess, 2 * self.schedule.orthogonality / len(sides))

        for (parameter, _), side, gram, size in zip(reached, wide, excess, sizes, strict=True):
            gram.div_(size)
            left, right = (side, gram) if _is_tall(side) else (gram, side)
            grad = parameter.grad
            assert grad is not None
            if grad.dtype == side.dtype:
                grad.addmm_(left, right)
            else:
                grad.add_(left @ right)

    def update_scores(self) -> None:
        """Take |w · ∂w| of every tensor of the budget into Ī and U."""
        seen = {
            f"{matrix.module.path}.{slot}": (w.detach(), w.grad)
            for matrix in self.matrices
            for slot, w in matrix.factors().items()
            if w.grad is not None
        }
        if not seen:
            return
        sizes = torch._foreach_mul([w for w, _ in seen.values()], [g for _, g in seen.values()])
        torch._foreach_abs_(sizes)
        now = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in sizes]

        # The model may have moved to another device since the last step.
        for key, each in zip(seen, now, strict=True):
            for known in (self.sensitivity, self.uncertainty):
                known[key] = known[key].to(each.device) if key in known else torch.zeros_like(each)
        means = [self.sensitivity[key] for key in seen]
        spreads = [self.uncertainty[key] for key in seen]
        torch._foreach_lerp_(means, now, 1 - self.schedule.beta1)
        torch._foreach_sub_(now, means)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(spreads, now, 1 - self.schedule.beta2)

    def _scores(self, matrix: Matrix) -> Tensor:
        """S of every triplet of one matrix, (rank,)."""
        total = torch.zeros(matrix.rank)
        for slot in matrix.factors():
            if (key := f"{matrix.module.path}.{slot}") in self.sensitivity:
                score = self.sensitivity[key] * self.uncertainty[key]
                if slot == matrix.scales:
                    total = total + score.flatten().cpu()
                else:
                    total = total + score.mean(1 - matrix.sides[slot]).cpu()
        return total

    @torch.no_grad()
    def after(self, n: int, optimizer: torch.optim.Optimizer) -> None:
        end = self.schedule.end
        due = n == end or (n < end and n % self.schedule.interval == 0)
        if n > self.schedule.start and due:
            self._switch_off(self._best(self.budget(n)), for_good=n == end)
        elif self.pattern is not None and not self.freed and n > end:
            self._switch_off(self.pattern, for_good=True)

        # What averages gradients between processes has sized its buffers for the whole run.
        if n == (self.schedule.total_steps if several_processes() else end):
            self._free(optimizer)

    def _best(self, count: int) -> list[Tensor]:
        """For each matrix, which of its triplets are among the `count` best of all."""
        scores = torch.cat([self._scores(matrix) for matrix in self.matrices])
        self.scores_were_equal = bool((scores == scores[0]).all())
        best = torch.sort(scores, descending=True, stable=True).indices[:count]
        kept = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, best, True)
        return list(torch.split(kept, [matrix.rank for matrix in self.matrices]))

    def _switch_off(self, pattern: list[Tensor], for_good: bool) -> None:
        """Zero the λ of the pruned triplets; `for_good` also what P and Q hold of them."""
        for matrix, kept in zip(self.matrices, pattern, strict=True):
            tensors = matrix.module.tensors()
            for slot, axis in (matrix.axes if for_good else {matrix.scales: 0}).items():
                tensor = tensors[slot]
                along = [-1 if dim == axis else 1 for dim in range(tensor.ndim)]
                tensor.mul_(kept.to(tensor).view(along))
        self.pattern = pattern

    def _free(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the pruned triplets out of parameters, gradients and optimizer state."""
        assert self.pattern is not None
        self.freed = all(matrix.sides for matrix in self.matrices)
        for matrix, kept in zip(self.matrices, self.pattern, strict=True):
            tensors = matrix.module.tensors()
            for slot, axis in matrix.axes.items() if matrix.sides else ():
                shrink_in_place(tensors[slot], kept.nonzero().flatten(), axis, optimizer)
        self.sensitivity, self.uncertainty = {}, {}  # no step after this one scores

    def state(self) -> dict[str, Any]:
        kept = zip(self.matrices, self.pattern or (), strict=False)
        return {
            "sensitivity": self.sensitivity,
            "uncertainty": self.uncertainty,
            "pattern": {matrix.module.path: k for matrix, k in kept},
            "all": self.all,
            "freed": self.freed,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.all, self.freed = int(state["all"]), bool(state["freed"])
        self.target = min(self.all, len(self.matrices) * self.schedule.target_rank)
        devices = {m.module.path: m.module.tensors()[m.scales].device for m in self.matrices}
        for known in ("sensitivity", "uncertainty"):  # by "path.slot"
            moved = {
                key: tensor.to(devices[key.rpartition(".")[0]], copy=True)
                for key, tensor in state[known].items()
            }
            setattr(self, known, moved)

        pattern = state["pattern"]
        self.pattern = [pattern[m.module.path].bool() for m in self.matrices] if pattern else None

    def took_all_ranks(self, module: AdaptedModule) -> bool:
        scales = module.tensors()[Matrix(module).scales]
        patterns = zip(self.matrices, self.pattern or (), strict=False)
        return any(
            m.module.tensors()[m.scales] is scales and not kept.any() for m, kept in patterns
        )

    def unfinished(self, n: int) -> str | None:
        if self.all == self.target:
            return None
        if n < self.schedule.end:
            return (
                f"adalora has not reached its final ranks: this is step {n} of "
                f"{self.schedule.total_steps}, and ranks are fixed after step {self.schedule.end}; "
                f"until then it keeps {self.all} ranks, for {self.target} at the end"
            )
        if self.scores_were_equal:
            return (
                "adalora's scores were all equal, so the ranks went by the modules' order alone: "
                "did gradients reach them?"
            )
        return None


def _is_tall(side: Tensor) -> bool:
    """Whether a factor has at least as many rows as columns: P, rather than Q."""
    return side.shape[0] >= side.shape[1]


def shrink_in_place(
    parameter: nn.Parameter, kept: Tensor, axis: int, optimizer: torch.optim.Optimizer
) -> None:
    """Shrink a parameter along `axis`, in place, with its gradient and optimizer state.

    The parameter stays the same object. If its optimizer state has another shape than the
    parameter, the state is dropped, and the optimizer starts it again.
    """
    old, kept = parameter.shape, kept.to(parameter.device)
    state = optimizer.state.get(parameter, {})
    for key, value in list(state.items()):
        if isinstance(value, Tensor) and value.shape == old:
            state[key] = value.index_select(axis, kept)
        elif isinstance(value, Tensor) and value.numel() > 1:
            state.clear()
            break

    smaller = parameter.data.index_select(axis, kept)
    parameter.grad = None
    # Some optimizers divide by the size, so an empty parameter must not train.
    parameter.requires_grad_(parameter.requires_grad and bool(smaller.numel()))

    # Autograd remembers the gradient's shape until the dtype changes.
    other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
    parameter.data = parameter.data.to(other)
    parameter.data = smaller
