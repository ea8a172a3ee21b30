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

from lorakin.family.batches import means_over_ranks, orthogonality_gradients
from lorakin.family.precision import wide_dtype
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

    def budget(self, n: int, ranks: int, final: int) -> int:
        """Returns b(n), how many of `ranks` may keep their λ after step n; `final` of them stay."""
        if n <= self.start:
            return ranks
        if n >= self.end:
            return final
        # In whole numbers, so that nothing is rounded.
        remaining, duration = self.end - n, self.end - self.start
        return final + (ranks - final) * remaining**3 // duration**3


class Matrix:
    """One P·Λ·Q of the budget. Several modules may share it; `module` is the first of them."""

    def __init__(self, module: AdaptedModule) -> None:
        self.module = module
        slots = module.method.parametrisation.slots
        switch = rank_switch(slots)
        assert switch is not None
        self.switch = switch
        """The slot Λ, whose entries switch triplets off."""
        self.factor_axes = rank_factors(slots)
        """The slots P and Q, and the axis along which each holds its ranks."""
        self.is_freed = bool(self.factor_axes) and module.method.parametrisation.frees_ranks
        """Whether its pruned ranks leave the tensors at the end, and are not only zero."""
        self.trained = tuple(slot for slot in (switch, *self.factor_axes) if module.trains(slot))

    def factors(self) -> dict[str, nn.Parameter]:
        """Returns Λ and the trained ones of P and Q by slot; nothing once all triplets are gone."""
        tensors = self.module.tensors()
        return {slot: tensors[slot] for slot in self.trained if tensors[slot].numel()}

    @property
    def axes(self) -> dict[str, int]:
        """Each of its tensors, and the axis along which that holds the triplets."""
        return {self.switch: 0, **self.factor_axes}

    @property
    def rank(self) -> int:
        """The number of triplets, pruned ones included until they are freed."""
        return len(self.module.tensors()[self.switch])


class Allocation(Rule):
    """Scores triplets before each step, keeps the best after it, and frees the rest at the end."""

    def __init__(self, schedule: RankSchedule, modules: Sequence[AdaptedModule]) -> None:
        self.schedule = schedule
        shared: dict[int, Matrix] = {}
        for module in modules:
            matrix = Matrix(module)
            shared.setdefault(id(module.tensors()[matrix.switch]), matrix)
        self.matrices = [matrix for matrix in shared.values() if matrix.switch in matrix.trained]
        self.sensitivity: dict[str, Tensor] = {}
        """Ī by "path.slot"."""
        self.uncertainty: dict[str, Tensor] = {}
        """U by "path.slot"."""
        self.kept: list[Tensor] | None = None
        """For each matrix, 1 for the triplets that are kept and 0 for others, (rank,).

        None before the first pruning.
        """
        self.total_ranks = sum(matrix.rank for matrix in self.matrices)
        self.final_ranks = min(self.total_ranks, len(self.matrices) * schedule.target_rank)
        """b0, the triplets at first, and b_T, those that stay."""
        self.freed = False
        self.last_scores: Tensor | None = None
        """The scores of the last pruning; all equal, they decided nothing."""
        self._keeps_any: list[bool] = []
        """For each matrix, whether any of its triplets is kept, once they are fixed."""

    def budget(self, n: int) -> int:
        """Returns b(n), how many triplets may keep their λ after step n."""
        return self.schedule.budget(n, self.total_ranks, self.final_ranks)

    @torch.no_grad()
    def before(self, n: int) -> None:
        # Pruned but not freed yet (with several processes): leave the pruned triplets out of R.
        waiting = n > self.schedule.end and not self.freed
        self.regularise(self.kept if waiting else None)
        if n <= self.schedule.end:
            self.update_scores()

    def regularise(self, kept: list[Tensor] | None = None) -> None:
        """Adds the exact gradient of γ·R: ∂P += γ · 2P(PᵀP − I)/‖PᵀP − I‖ / count; so for Q.

        With `kept`, I has ones for the kept triplets only; all else of the others is zero.
        """
        parameters: dict[str, nn.Parameter] = {}
        kept_of: dict[str, Tensor] = {}
        for n, matrix in enumerate(self.matrices):
            if kept is not None and not self._keeps_any[n]:
                continue
            for slot, factor in matrix.factors().items():
                if slot != matrix.switch:
                    key = f"{matrix.module.path}.{slot}"
                    parameters[key] = factor
                    if kept is not None:
                        kept_of[key] = kept[n]
        reached = {key: p for key, p in parameters.items() if p.grad is not None}
        if not reached:
            return

        wide = [(key, p.to(wide_dtype(p.dtype))) for key, p in reached.items()]
        gradients = orthogonality_gradients(wide, None if kept is None else kept_of)
        torch._foreach_add_(
            [p.grad for p in reached.values() if p.grad is not None],
            [gradients[key] for key in reached],
            alpha=2 * self.schedule.orthogonality / len(parameters),
        )

    def update_scores(self) -> None:
        """Takes |w · ∂w| of every tensor of the budget into Ī and U."""
        trained = {
            f"{matrix.module.path}.{slot}": (w.detach(), w.grad)
            for matrix in self.matrices
            for slot, w in matrix.factors().items()
            if w.grad is not None
        }
        if not trained:
            return
        products = torch._foreach_mul(
            [w for w, _ in trained.values()], [grad for _, grad in trained.values()]
        )
        torch._foreach_abs_(products)
        sizes = [product.to(wide_dtype(product.dtype)) for product in products]

        # The model may have moved to another device since the last step.
        for key, size in zip(trained, sizes, strict=True):
            for mean in (self.sensitivity, self.uncertainty):
                mean[key] = mean[key].to(size.device) if key in mean else torch.zeros_like(size)
        sensitivity = [self.sensitivity[key] for key in trained]
        uncertainty = [self.uncertainty[key] for key in trained]
        torch._foreach_lerp_(sensitivity, sizes, 1 - self.schedule.beta1)
        # The deviations take the memory of the sizes.
        deviations = sizes
        torch._foreach_sub_(deviations, sensitivity)
        torch._foreach_abs_(deviations)
        torch._foreach_lerp_(uncertainty, deviations, 1 - self.schedule.beta2)

    def scores(self) -> Tensor:
        """Returns S of all triplets, matrix after matrix, (triplets,)."""
        known = {
            f"{matrix.module.path}.{slot}": (n, slot)
            for n, matrix in enumerate(self.matrices)
            for slot in matrix.factors()
        }
        known = {key: place for key, place in known.items() if key in self.sensitivity}
        if not known:
            return torch.zeros(sum(matrix.rank for matrix in self.matrices))
        products = torch._foreach_mul(
            [self.sensitivity[key] for key in known], [self.uncertainty[key] for key in known]
        )
        of_entries = dict(zip(known, products, strict=True))
        is_factor = {key: slot != self.matrices[n].switch for key, (n, slot) in known.items()}
        of_ranks = means_over_ranks(item for item in of_entries.items() if is_factor[item[0]])
        of_ranks |= {key: t.flatten() for key, t in of_entries.items() if not is_factor[key]}

        # One row for each slot, so that one kernel adds them; all on one device, without a wait.
        device = products[0].device
        at_place = {place: of_ranks[key] for key, place in known.items()}
        slots = dict.fromkeys(slot for _, slot in at_place)
        rows = [
            torch.zeros(matrix.rank, device=device)
            if (n, slot) not in at_place
            else at_place[n, slot].to(device, non_blocking=True)
            for slot in slots
            for n, matrix in enumerate(self.matrices)
        ]
        return torch.cat(rows).view(len(slots), -1).sum(0)

    @torch.no_grad()
    def after(self, n: int, optimizer: torch.optim.Optimizer) -> None:
        end = self.schedule.end
        is_due = n == end or (n < end and n % self.schedule.interval == 0)
        if n > self.schedule.start and is_due:
            self._switch_off(self._best(self.budget(n)), for_good=n == end)
        elif self.kept is not None and not self.freed and n > end:
            self._switch_off(self.kept, for_good=True)

        # DDP sized its buckets for the whole run, so ranks are freed only at its end.
        if n == (self.schedule.total_steps if several_processes() else end):
            self._free(optimizer)

    def _best(self, count: int) -> list[Tensor]:
        """Returns for each matrix which of its triplets are among the `count` best of all.

        1 for a triplet that is kept and 0 for others, (rank,). Everything stays on the device.
        """
        self.last_scores = scores = self.scores()
        best = torch.sort(scores, descending=True, stable=True).indices[:count]
        kept = torch.zeros_like(scores).index_fill_(0, best, 1)
        return list(torch.split(kept, [matrix.rank for matrix in self.matrices]))

    def _switch_off(self, kept: list[Tensor], for_good: bool) -> None:
        """Zeroes the λ of the pruned triplets; `for_good` also their part of P and Q."""
        switches: list[Tensor] = [m.module.tensors()[m.switch] for m in self.matrices]
        on_device = [
            kept_here.to(switch.device, switch.dtype, non_blocking=True)
            for switch, kept_here in zip(switches, kept, strict=True)
        ]
        masks = [m.view_as(switch) for m, switch in zip(on_device, switches, strict=True)]
        torch._foreach_mul_(switches, masks)
        if for_good:
            for matrix, mask in zip(self.matrices, on_device, strict=True):
                tensors = matrix.module.tensors()
                for slot, axis in matrix.factor_axes.items():
                    along = [-1 if dim == axis else 1 for dim in range(tensors[slot].ndim)]
                    tensors[slot].mul_(mask.to(tensors[slot]).view(along))
            self._keeps_any = [bool(kept_here.any()) for kept_here in kept]
        self.kept = kept

    def _free(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the pruned triplets out of parameters, gradients and optimizer state."""
        assert self.kept is not None
        self.freed = all(matrix.is_freed for matrix in self.matrices)
        for matrix, kept in zip(self.matrices, self.kept, strict=True):
            tensors = matrix.module.tensors()
            for slot, axis in matrix.axes.items() if matrix.is_freed else ():
                shrink_in_place(tensors[slot], kept.nonzero().flatten(), axis, optimizer)
        # No later step scores.
        self.sensitivity, self.uncertainty = {}, {}

    def state(self) -> dict[str, Any]:
        kept = zip(self.matrices, self.kept or (), strict=False)
        return {
            "sensitivity": self.sensitivity,
            "uncertainty": self.uncertainty,
            "pattern": {matrix.module.path: k.bool() for matrix, k in kept},
            "all": self.total_ranks,
            "freed": self.freed,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.total_ranks, self.freed = int(state["all"]), bool(state["freed"])
        self.final_ranks = min(self.total_ranks, len(self.matrices) * self.schedule.target_rank)
        devices = {m.module.path: m.module.tensors()[m.switch].device for m in self.matrices}
        for name in ("sensitivity", "uncertainty"):
            # The keys are "path.slot".
            moved = {
                key: tensor.to(devices[key.rpartition(".")[0]], copy=True)
                for key, tensor in state[name].items()
            }
            setattr(self, name, moved)

        kept = state["pattern"]
        self.kept = [kept[m.module.path].float() for m in self.matrices] if kept else None
        self._keeps_any = [bool(kept_here.any()) for kept_here in self.kept or ()]

    def took_all_ranks(self, module: AdaptedModule) -> bool:
        switch = module.tensors()[Matrix(module).switch]
        kept = zip(self.matrices, self.kept or (), strict=False)
        return any(
            matrix.module.tensors()[matrix.switch] is switch and not kept_here.any()
            for matrix, kept_here in kept
        )

    def unfinished(self, n: int) -> str | None:
        if self.total_ranks == self.final_ranks:
            return None
        if n < self.schedule.end:
            return (
                f"adalora has not reached its final ranks: this is step {n} of "
                f"{self.schedule.total_steps}, and ranks are fixed after step {self.schedule.end}; "
                f"until then it keeps {self.total_ranks} ranks, for {self.final_ranks} at the end"
            )
        scores = self.last_scores
        if scores is not None and bool((scores == scores[0]).all()):
            return (
                "adalora's scores were all equal, so the ranks went by the modules' order alone: "
                "did gradients reach them?"
            )
        return None


def shrink_in_place(
    parameter: nn.Parameter, kept: Tensor, axis: int, optimizer: torch.optim.Optimizer
) -> None:
    """Shrinks a parameter along `axis`, in place, with its gradient and optimizer state.

    The parameter stays the same object. If its optimizer state has another shape than the
    parameter, the state is dropped, and the optimizer starts it again.
    """
    kept = kept.to(parameter.device)
    state = optimizer.state.get(parameter, {})
    for key, value in list(state.items()):
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state[key] = value.index_select(axis, kept)
        elif isinstance(value, Tensor) and value.numel() > 1:
            state.clear()
            break

    smaller = parameter.data.index_select(axis, kept)
    parameter.grad = None
    # Some optimizers divide by the size, so an empty parameter must not train.
    parameter.requires_grad_(parameter.requires_grad and bool(smaller.numel()))

    # Autograd remembers the gradient's shape until the dtype changes.
    other_dtype = torch.float16 if parameter.dtype != torch.float16 else torch.float32
    parameter.data = parameter.data.to(other_dtype)
    parameter.data = smaller
