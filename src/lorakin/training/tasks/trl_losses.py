"""TRL's own losses of held-out rows, from log-probabilities that are known.

TRL computes a loss within its trainers, as the mean over a batch. Here each row is such a batch,
with log-probabilities in place of a model's forward.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from lorakin.training.preference_trainer import QUIET
from lorakin.training.tasks.answer_pairs import Likelihoods
from lorakin.training.tasks.trainer_kind import from_trl, quiet_config

Array = npt.NDArray[Any]


class _Known(torch.nn.Module):
    """Stands where a trainer has a model: returns log-probabilities, (sides, tokens)."""

    is_gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        self.log_probs = torch.zeros(0)
        self.training = False

    def forward(self, **_: Any) -> Any:
        """Returns what a trainer's fused head returns."""
        nothing = torch.zeros_like(self.log_probs)
        return types.SimpleNamespace(
            log_probs=self.log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )


def _same(value: Tensor) -> Tensor:
    return value


class _Judge:
    """Mixed in before a trainer of TRL: it holds settings and computes losses, and trains none."""

    def __init__(self, settings: Any) -> None:
        self.args = settings
        self.model, self.ref_model = _Known(), _Known()
        self.accelerator = types.SimpleNamespace(
            device=torch.device("cpu"), gather=_same, gather_for_metrics=_same
        )
        self.beta, self.precompute_ref_logps, self.aux_loss_enabled = settings.beta, False, False
        self._metrics: Any = {"eval": collections.defaultdict(list)}
        self._total_train_tokens, self._tp_size = 0, 1

    def show(self, policy: Array, reference: Array) -> None:
        """Takes the log-probabilities of one row, (sides, tokens) each."""
        self.model.log_probs = torch.from_numpy(policy).float()
        self.ref_model.log_probs = torch.from_numpy(reference).float()

    def last(self, name: str) -> float:
        """Returns the last value of a metric."""
        return float(self._metrics["eval"][name][-1])


class _PairJudge(_Judge, DPOTrainer):  # type: ignore[misc]
    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.loss_types = settings.loss_type
        self.loss_weights = settings.loss_weights or [1.0] * len(self.loss_types)
        self.ld_alpha, self.label_smoothing = settings.ld_alpha, settings.label_smoothing
        self.f_divergence_type = settings.f_divergence_type
        self.f_alpha_divergence_coef = settings.f_alpha_divergence_coef
        self.use_weighting = False


class _AnswerJudge(_Judge, KTOTrainer):  # type: ignore[misc]
    def __init__(self, settings: Any, kl: float) -> None:
        super().__init__(settings)
        self.loss_type, self.kl = settings.loss_type, torch.tensor([kl])
        self.desirable_weight = settings.desirable_weight
        self.undesirable_weight = settings.undesirable_weight
        self.calculate_KL = settings.loss_type == "kto"

    def _compute_kl_logps(self, model: Any, batch: Any) -> Tensor:
        return self.kl if model is self.model else torch.zeros(1)


def _batch(counts: Array, width: int) -> dict[str, Tensor]:
    """Returns what a trainer looks at besides log-probabilities: how long the answers are."""
    mask = torch.arange(width + 1)[None] <= torch.as_tensor(counts)[:, None]
    mask[:, 0] = False
    ones = torch.ones_like(mask, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones, "completion_mask": mask.long()}


def pair_losses(settings: Any, found: Likelihoods) -> tuple[Array, Array]:
    """Returns the losses of pairs, (rows,), and the rewards of both sides, (rows, 2).

    Args:
        settings: a `trl.DPOConfig`. WPO's weights (`use_weighting`) are left out.
        found: how likely the answers are.
    """
    judge: Any = _PairJudge(settings)
    losses, rewards = [], []
    for policy, reference, counts in zip(found.policy, found.reference, found.counts, strict=True):
        judge.show(policy, reference)
        loss = judge._compute_loss(judge.model, _batch(counts, policy.shape[1]), False)
        losses.append(float(loss))
        rewards.append([judge.last("rewards/chosen"), judge.last("rewards/rejected")])
    return np.array(losses), np.array(rewards)


def answer_losses(
    settings: Any, found: Likelihoods, good: Sequence[bool], kl: float
) -> tuple[Array, Array]:
    """Returns the losses of answers that are good or not, and their rewards, (rows,) each.

    Args:
        settings: a `trl.KTOConfig`.
        found: how likely the answers are.
        good: which of them are good.
        kl: the mean log-ratio of answers to other prompts.
    """
    judge: Any = _AnswerJudge(settings, kl)
    losses, rewards = [], []
    rows = zip(found.policy, found.reference, found.counts, good, strict=True)
    for policy, reference, counts, is_good in rows:
        judge.show(policy, reference)
        batch = _batch(counts, policy.shape[1]) | {"label": torch.tensor([is_good])}
        losses.append(float(judge._compute_loss(judge.model, batch, False)))
        rewards.append(judge.last("rewards/chosen" if is_good else "rewards/rejected"))
    return np.array(losses), np.array(rewards)


def odds_losses(settings: Any, means: Array, nll: Array) -> tuple[Array, Array]:
    """Returns ORPO's losses of pairs, (rows,), and the rewards of both sides, (rows, 2).

    Args:
        settings: a `trl.ORPOConfig`.
        means: the mean log-probability of each answer's tokens, (rows, 2).
        nll: the mean loss of the better answer with its prompt, (rows,).
    """
    judge: Any = types.SimpleNamespace(
        beta=settings.beta, accelerator=types.SimpleNamespace(device=torch.device("cpu"))
    )
    sides = torch.from_numpy(means).float()
    trainer = from_trl("trl.experimental.orpo.orpo_trainer", "orpo").ORPOTrainer
    odds, chosen, rejected, *_ = trainer.odds_ratio_loss(judge, sides[:, 0], sides[:, 1])
    return nll - odds.numpy(), torch.stack([chosen, rejected], 1).numpy()


def settings_of(config: Any, folder: str, arguments: Mapping[str, Any]) -> Any:
    """Returns the arguments of a trainer of TRL for which no run is planned."""
    return quiet_config(config, output_dir=folder, report_to="none", **QUIET, **arguments)
