"""One step of the tasks that compare answers, as TRL's trainers take it, for `lorakin plan`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from lorakin.switching import adapters
from lorakin.training.reference_adapter import as_reference
from lorakin.training.tasks.trainer_kind import from_trl

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""What TRL's trainers let the fused head compute."""
Batch = Mapping[str, Tensor]


def full_texts(rows: int, length: int) -> dict[str, Tensor]:
    """Returns a batch of texts of full length, all of whose tokens are answers."""
    ids = torch.ones(rows, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids, "labels": ids}


def pair_step(model: Any, batch: Batch) -> Tensor:
    """Returns DPO's loss of a batch of the better answers, then of the others."""
    ratios = _ratios(model, batch, _summed)
    chosen, rejected = ratios.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def verdict_step(model: Any, batch: Batch) -> Tensor:
    """Returns KTO's loss of a batch of answers; as many answers to other prompts go before."""
    with torch.no_grad():
        others = _summed(model, batch)
    ratios = _ratios(model, batch, lambda m, b: (_summed(m, b), _summed(m, b))[1])
    return (1 - torch.sigmoid(ratios - others.mean())).mean()


def odds_step(model: Any, batch: Batch) -> Tensor:
    """Returns ORPO's loss of a batch of the better answers, then of the others."""
    trainer = from_trl("trl.experimental.orpo.orpo_trainer", "orpo").ORPOTrainer
    labels = batch["labels"]
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    rows = len(labels) // 2
    chosen = logits[:rows, :-1].contiguous().flatten(0, 1)
    nll = F.cross_entropy(chosen, labels[:rows, 1:].flatten())
    better, other = trainer.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)
    return nll - F.logsigmoid(better - other).mean()


def _ratios(model: Any, batch: Batch, of_reference: Callable[[Any, Batch], Tensor]) -> Tensor:
    """Returns the log-ratios of a model's answers to its reference's, if it has adapters."""
    policy = _summed(model, batch)
    if not adapters(model):
        return policy
    with torch.no_grad(), as_reference(model):
        reference = of_reference(model, batch)
    return policy - reference


def _summed(model: Any, batch: Batch) -> Tensor:
    """Returns the log-probability of each answer, by TRL's head that forms no logits."""
    if "forward" not in vars(model):
        add_fused_lm_head(model, outputs=OUTPUTS)
    out = model(**batch, fused_lm_head=True, use_cache=False)
    total: Tensor = out.log_probs.sum(1)
    return total
