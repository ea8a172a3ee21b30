"""AdaLoRA: write the change as P·Λ·Q and train all three; a budget moves ranks where they help.

Paper:    "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
          arXiv 2303.10512.
Forward:  y = W0 x + b + s · P (Λ (Q x̃))
          s = alpha / (r0 + 1e-5); r0 stays the initial rank, also after pruning
Shapes:   P (out, r0), Λ kept as E (r0, 1), Q (r0, in); no SVD, entries of Λ may be negative
Trains:   P, E, Q: r0 · (in + out + 1) parameters, fewer once ranks are freed
Start:    P, Q normal with deviation 0.02, E = 0
Loss:     plus γ·R, R the mean of ‖PᵀP − I‖ and ‖QQᵀ − I‖ over all P and Q

Before each step, from the gradients of that loss:

    I = |w · ∂w|      Ī ← β1·Ī + (1−β1)·I      U ← β2·U + (1−β2)·|I − Ī|      s(w) = Ī·U
    S_j = s(λ_j) + mean s(P_·j) + mean s(Q_j·)             for triplet j of each matrix

After step n the b(n) triplets with the largest S keep their λ; all others get λ = 0:

    n ≤ t_i              everything
    t_i < n < T − t_f    b = ⌊b_T + (b0 − b_T) · (1 − (n − t_i)/(T − t_i − t_f))³⌋,
                         every `interval` steps
    n = T − t_f          b_T, for good: triplets without λ are freed, with their gradients and
                         optimizer state

with t_i `start`, t_f `finish`, T `total_steps`, and b0 → b_T the budgets. n counts finished
optimizer steps from 1. The steps themselves are in `allocation.py`.

Differences from the authors' code: its loop passes the number of steps finished before, so b(n − 1)
follows step n; it scores until n = T − t_f as here, but then masks by the last scores after every
step and frees nothing. As in that code, and unlike the paper's equation 12, the numerator n − t_i
does not subtract t_f as well (with it, b exceeds b0 at first), and R uses unsquared norms.
On VeRA, d is pruned instead of Λ, by its own score.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lorakin.errors import LorakinWarning
from lorakin.family.allocation import Allocation, RankSchedule
from lorakin.family.change import LowRank
from lorakin.family.linear_algebra import orthonormal_rows
from lorakin.family.measure import UnadaptedModule
from lorakin.family.member import Modifier, Parametrisation
from lorakin.family.pair import Tensors
from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.settings import check_pair_settings, require, to_number, to_whole_number
from lorakin.family.slots import Slot, Slots, rank_switch


@dataclass(frozen=True)
class Triplets(Parametrisation):
    """P·Λ·Q, the pair that AdaLoRA brings; it is not a member by itself.

    It has `initial_rank` triplets at first and `kept` of them once the others are freed.
    """

    word: ClassVar[str] = "adalora's P·Λ·Q"
    decides: ClassVar[Mapping[str, str]] = {"parametrisation": "the change is P·Λ·Q"}
    learning_rate: ClassVar[float] = 5e-4
    in_probe: ClassVar[bool] = False
    per_module: ClassVar[frozenset[str]] = frozenset({"alpha", "kept"})
    not_compared: ClassVar[frozenset[str]] = frozenset({"kept"})
    frees_ranks: ClassVar[bool] = True
    test_settings: ClassVar[Mapping[str, Any]] = {"initial_rank": 6}
    slots: ClassVar[Slots] = {
        "P": Slot(("outputs", "rank"), peft="lora_B"),
        "E": Slot(("rank", 1), starts_at_zero=True, peft="lora_E"),
        "Q": Slot(("rank", "inputs"), is_random_factor=True, peft="lora_A"),
    }

    initial_rank: int = 12
    alpha: float = 32.0
    dropout: float = 0.0
    kept: int | None = None

    def __post_init__(self) -> None:
        check_pair_settings(self)
        to_whole_number(self, "initial_rank", at_least=1)

    @property
    def rank(self) -> int:
        """The number of triplets."""
        return self.initial_rank if self.kept is None else self.kept

    @property
    def scaling(self) -> float:
        """s, the factor in front of P·Λ·Q; the divisor stays the initial rank's."""
        return self.alpha / (self.initial_rank + 1e-5)

    def clamped(self, largest: int) -> Mapping[str, int]:
        return {"kept": largest} if self.rank > largest else {}

    def start(
        self, module: UnadaptedModule, generator: torch.Generator | None, device: torch.device
    ) -> Tensors:
        shape = module.shape
        P = torch.empty(shape.outputs, self.rank, device=device, dtype=torch.float32)
        Q = torch.empty(self.rank, shape.inputs, device=device, dtype=torch.float32)
        E = torch.zeros(self.rank, 1, device=device, dtype=torch.float32)
        return {
            "P": P.normal_(0, 0.02, generator=generator),
            "E": E,
            "Q": Q.normal_(0, 0.02, generator=generator),
        }

    def start_if_frozen(self, tensors: Tensors) -> Tensors:
        return {**tensors, "Q": orthonormal_rows(tensors["Q"])}

    def change(self, tensors: Mapping[str, Tensor]) -> LowRank:
        return LowRank(tensors["P"], tensors["E"] * tensors["Q"], self.scaling)


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Modifier):
    """AdaLoRA: ranks are pruned while training.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> method = lk.AdaLoRA(initial_rank=3, target_rank=2, start=1, finish=2)
    >>> adapter = lk.adapt(model, method, "0")
    >>> optimizer = adapter.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=6)
    >>> for _ in range(6):
    ...     model(torch.ones(4, 6)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> model[0].lorakin.default.P.shape
    torch.Size([5, 2])

    Args:
        initial_rank: r0 of every module (PEFT: `init_r`); 12, unless another member brings the
            pair.
        target_rank: the average rank at the end (PEFT: `target_r`).
        total_steps: T, the run's optimizer steps. A trainer knows it; otherwise pass it to
            `adapter.optimizer(…, total_steps=T)`.
        start: t_i, the steps before pruning begins (PEFT: `tinit`); 0.12·T by default. The paper
            sets it for each task, on GLUE to 9 to 17 % of T.
        finish: t_f, the steps after the ranks are fixed (PEFT: `tfinal`); 0.45·T by default. On
            GLUE the paper takes 37 to 58 % of T.
        interval: ΔT, the steps between two prunings (PEFT: `deltaT`). The default depends on T: 1
            below 5,000, 10 below 15,000, then 100.
        beta1, beta2: smoothing of the sensitivity and of its uncertainty.
        orthogonality: γ, the weight of R (PEFT: `orth_reg_weight`).

    Raises:
        SettingError: a value is outside its range, or the schedule does not fit the run.
    """

    word: ClassVar[str] = "adalora"
    paper: ClassVar[str] = (
        "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512"
    )
    decides: ClassVar[Mapping[str, str]] = {"budget": "ranks are pruned while training"}
    in_probe: ClassVar[bool] = False
    test_settings: ClassVar[Mapping[str, Any]] = {"target_rank": 2, "start": 1, "finish": 3}
    pair_settings: ClassVar[tuple[str, ...]] = (
        "initial_rank",
        "alpha",
        "dropout",
        "rank",
        "rslora",
    )

    initial_rank: int | None = None
    target_rank: int = 8
    total_steps: int | None = None
    start: int | None = None
    finish: int | None = None
    interval: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.rank is None,
            "adalora has no single rank: give initial_rank and target_rank instead of rank",
        )
        require(not self.rslora, "adalora scales by its initial rank, so rslora cannot apply")
        to_whole_number(self, "target_rank", at_least=1)
        for name, least in (
            ("initial_rank", 1),
            ("total_steps", 1),
            ("start", 0),
            ("finish", 0),
            ("interval", 1),
        ):
            to_whole_number(self, name, at_least=least, optional=True)
        for name in ("beta1", "beta2"):
            to_number(self, name, lambda beta: 0 < beta < 1, "a number between 0 and 1")
        to_number(self, "orthogonality", lambda gamma: 0 <= gamma < float("inf"), "a number ≥ 0")

    def default_pair(self) -> type[Parametrisation]:
        return Triplets

    def refusal_of_pair(self, pair_class: type[Parametrisation]) -> str | None:
        if rank_switch(pair_class.slots) is None:
            return (
                f"{pair_class.word} has no trained factor for each rank to prune by; leave it out, "
                "adalora brings P·Λ·Q"
            )
        return None

    @property
    def acts_at_steps(self) -> bool:
        return True

    @classmethod
    def comparable_settings(cls, rank: int, scaling: float, steps: int) -> dict[str, Any]:
        initial = rank + max(1, rank // 2)
        return {
            "rank": None,
            "target_rank": rank,
            "initial_rank": initial,
            "alpha": scaling * initial,
        }

    def resolved(self, method: Any, total_steps: int | None) -> Self:
        T = total_steps or self.total_steps
        require(
            self.total_steps in (None, T),
            f"adalora has total_steps={self.total_steps}, but the run has {T} steps; leave "
            "total_steps out, or make them equal",
        )
        require(
            T is not None,
            "adalora plans over the whole run and does not know its length: give total_steps, in "
            "AdaLoRA(total_steps=…) or adapter.optimizer(…, total_steps=…), or call "
            "lorakin.training.prepare_trainer(trainer)",
        )
        assert T is not None

        start = round(0.12 * T) if self.start is None else self.start
        finish = round(0.45 * T) if self.finish is None else self.finish
        require(
            start + finish < T,
            f"adalora has start={start} and finish={finish}, which leaves no step of {T} to prune "
            f"in; their sum must be below {T}",
        )

        initial = method.parametrisation.rank
        if self.target_rank >= initial:
            warnings.warn(
                f"target_rank={self.target_rank} is not below initial_rank={initial}, so adalora "
                "prunes nothing",
                LorakinWarning,
                stacklevel=2,
            )

        interval = self.interval or (1 if T < 5_000 else 10 if T < 15_000 else 100)
        return dataclasses.replace(
            self, total_steps=T, start=start, finish=finish, interval=interval
        )

    def rule(self, modules: Sequence[AdaptedModule]) -> Rule:
        assert self.total_steps is not None
        start, finish = self.start or 0, self.finish or 0
        schedule = RankSchedule(
            target_rank=self.target_rank,
            total_steps=self.total_steps,
            start=start,
            end=self.total_steps - finish,
            interval=self.interval or 1,
            beta1=self.beta1,
            beta2=self.beta2,
            orthogonality=self.orthogonality,
        )
        return Allocation(schedule, modules)
