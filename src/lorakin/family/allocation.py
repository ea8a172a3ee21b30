"""AdaLoRA's training rule: the regulariser's gradient, the scores, the budget and the freeing of ranks.

The equations stand in `adalora.py`; this is their other half, what happens at each optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.slots import scale_of_ranks, sides_of_ranks


@dataclass(frozen=True)
class RankSchedule:
    """How many ranks there may be at each step, and how they are scored."""

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
        """b(n): how many of so many ranks may keep their λ after step n, when `target` of them stay."""
        if n <= self.start:
            return ranks
        if n >= self.end:
            return target
        left, all_of_it = (self.end - n) ** 3, (self.end - self.start) ** 3
        return target + (ranks - target) * left // all_of_it  # exact in whole numbers


class Matrix:
    """One P·Λ·Q of the budget, which several modules may share."""

    def __init__(self, module: AdaptedModule) -> None:
        self.module = module
        slots = module.method.parametrisation.slots
        scales = scale_of_ranks(slots)
        assert scales is not None
        self.scales = scales
        self.sides = sides_of_ranks(slots)
        """P and Q, and the axis along which each has its ranks."""
        self.trained = tuple(slot for slot in (scales, *self.sides) if module.trains(slot))

    def factors(self) -> dict[str, nn.Parameter]:
        """Λ and those of P and Q that train, by slot, unless all triplets are gone."""
        tensors = self.module.tensors()
        return {slot: tensors[slot] for slot in self.trained if tensors[slot].numel()}

    @property
    def axes(self) -> dict[str, int]:
        """Where its triplets lie: each of its tensors, and along which axis."""
        return {self.scales: 0, **self.sides}

    @property
    def rank(self) -> int:
        """How many triplets it has now, pruned ones included until they are freed."""
        return len(self.module.tensors()[self.scales])


class Allocation(Rule):
    """Scores triplets before each step, keeps the best of them after it, and frees the others in the end."""

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
        self.all = sum(matrix.rank for matrix in self.matrices)
        self.target = min(self.all, len(self.matrices) * schedule.target_rank)
        self.freed = self.blind = False

    def budget(self, n: int) -> int:
        """b(n), the triplets that may keep their λ after step n."""
        return self.schedule.budget(n, self.all, self.target)

    @torch.no_grad()
    def before(self, n: int) -> None:
        fixed = n > self.schedule.end and not self.freed
        self.regularise(self.pattern if fixed else None)
        if n <= self.schedule.end:
            self.observe()

    def regularise(self, pattern: list[Tensor] | None = None) -> None:
        """∂P += γ · 2P(PᵀP − I)/‖PᵀP − I‖ / count, and so for Q: the exact gradient of γ·R.

        Of a `pattern` only the triplets that were kept count; what stands beside the others is zero.
        """
        kept = pattern or [torch.ones(matrix.rank, dtype=torch.bool) for matrix in self.matrices]
        alive = [(m, k) for m, k in zip(self.matrices, kept, strict=True) if k.any()]
        sides = [
            (factor, k)
            for m, k in alive
            for slot, factor in m.factors().items()
            if slot != m.scales
        ]
        with_grad = [side for side, _ in sides if side.grad is not None]
        if not with_grad:
            return
        wide = [side.to(torch.promote_types(side.dtype, torch.float32)) for side in with_grad]
        excess = [
            side.T @ side if side.shape[0] >= side.shape[1] else side @ side.T for side in wide
        ]
        for gram, k in zip(excess, (k for side, k in sides if side.grad is not None), strict=True):
            gram.diagonal().sub_(k.to(gram))
        sizes = [
            size.clamp(min=torch.finfo(size.dtype).tiny) for size in torch._foreach_norm(excess)
        ]
        torch._foreach_mul_(excess, 2 * self.schedule.orthogonality / len(sides))
        for parameter, side, gram, size in zip(with_grad, wide, excess, sizes, strict=True):
            factors = (
                (side, gram.div_(size))
                if side.shape[0] >= side.shape[1]
                else (gram.div_(size), side)
            )
            grad = parameter.grad
            assert grad is not None
            if grad.dtype == side.dtype:
                grad.addmm_(*factors)
            else:
                grad.add_(factors[0] @ factors[1])

    def observe(self) -> None:
        """Ī and U take in |w · ∂w| of every tensor of the budget."""
        seen = {
            f"{m.module.path}.{slot}": w
            for m in self.matrices
            for slot, w in m.factors().items()
            if w.grad is not None
        }
        if not seen:
            return
        sizes = torch._foreach_mul(
            [w.detach() for w in seen.values()],
            [w.grad for w in seen.values() if w.grad is not None],
        )
        torch._foreach_abs_(sizes)
        now = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in sizes]
        for key, each in zip(seen, now, strict=True):
            for known in (self.sensitivity, self.uncertainty):  # moved, if the model was since
                known[key] = known[key].to(each.device) if key in known else torch.zeros_like(each)
        means, spreads = (
            [known[key] for key in seen] for known in (self.sensitivity, self.uncertainty)
        )
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
        due = n == self.schedule.end or (n < self.schedule.end and n % self.schedule.interval == 0)
        if n > self.schedule.start and due:
            scores = torch.cat([self._scores(matrix) for matrix in self.matrices])
            self.blind = bool((scores == scores[0]).all())
            best = torch.sort(scores, descending=True, stable=True).indices[: self.budget(n)]
            kept = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, best, True)
            self._switch_off(
                list(torch.split(kept, [matrix.rank for matrix in self.matrices])),
                for_good=n == self.schedule.end,
            )
        elif self.pattern is not None and not self.freed and n > self.schedule.end:
            self._switch_off(self.pattern, for_good=True)
        last = (
            self.schedule.total_steps if several_processes() else self.schedule.end
        )  # what averages gradients has sized its buffers
        if n == last:
            self._free(optimizer)

    def _switch_off(self, pattern: list[Tensor], for_good: bool) -> None:
        """Set the λ of pruned triplets to zero; for good also what stands on both their sides, as if they were freed."""
        for matrix, kept in zip(self.matrices, pattern, strict=True):
            tensors = matrix.module.tensors()
            for slot, axis in (matrix.axes if for_good else {matrix.scales: 0}).items():
                tensor = tensors[slot]
                tensor.mul_(
                    kept.to(tensor).view(
                        [-1 if along == axis else 1 for along in range(tensor.ndim)]
                    )
                )
        self.pattern = pattern

    def _free(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the pruned triplets out of parameters, gradients and optimizer state. The scores have done their work."""
        assert self.pattern is not None
        self.freed = all(matrix.sides for matrix in self.matrices)
        for matrix, kept in zip(self.matrices, self.pattern, strict=True):
            tensors = matrix.module.tensors()
            for slot, axis in matrix.axes.items() if matrix.sides else ():
                keep_only(tensors[slot], kept.nonzero().flatten(), axis, optimizer)
        self.sensitivity, self.uncertainty = {}, {}

    def state(self) -> dict[str, Any]:
        pattern = {
            m.module.path: kept for m, kept in zip(self.matrices, self.pattern or (), strict=False)
        }
        counts = {"all": self.all, "freed": self.freed}
        return {
            "sensitivity": self.sensitivity,
            "uncertainty": self.uncertainty,
            "pattern": pattern,
            **counts,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.all, self.freed = int(state["all"]), bool(state["freed"])
        self.target = min(self.all, len(self.matrices) * self.schedule.target_rank)
        devices = {m.module.path: m.module.tensors()[m.scales].device for m in self.matrices}
        for name in ("sensitivity", "uncertainty"):
            moved = {
                key: t.to(devices[key.rpartition(".")[0]], copy=True)
                for key, t in state[name].items()
            }
            setattr(self, name, moved)
        self.pattern = (
            [state["pattern"][m.module.path].bool() for m in self.matrices]
            if state["pattern"]
            else None
        )

    def gave_up(self, module: AdaptedModule) -> bool:
        scales = module.tensors()[Matrix(module).scales]
        patterns = zip(self.matrices, self.pattern or (), strict=False)
        return any(
            m.module.tensors()[m.scales] is scales and not kept.any() for m, kept in patterns
        )

    def check(self, n: int) -> str | None:
        if self.all == self.target:
            return None
        if n < self.schedule.end:
            return (
                f"adalora has not come to its final ranks: this is step {n} of {self.schedule.total_steps}, they are fixed after "
                f"step {self.schedule.end}; until then {self.all} ranks are kept for {self.target}"
            )
        if self.blind:
            return "adalora's scores were all equal, so the ranks went by the modules' order alone: did gradients reach them?"
        return None


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def keep_only(
    parameter: nn.Parameter, kept: Tensor, axis: int, optimizer: torch.optim.Optimizer
) -> None:
    """Shrink a parameter along `axis` in place, the same object, with its gradient and what the optimizer keeps for it.

    State of another shape than the parameter's is given up; the optimizer then begins it anew.
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
    parameter.requires_grad_(
        parameter.requires_grad and bool(smaller.numel())
    )  # some optimizers divide by the size
    parameter.data = parameter.data.to(
        torch.float16 if parameter.dtype != torch.float16 else torch.float32
    )
    parameter.data = smaller  # by way of another dtype, at which autograd forgets the shape it expects of the gradient
