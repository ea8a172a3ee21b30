"""Preference tuning by TRL: of two answers the better one becomes likelier (DPO, ORPO)."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from rich.text import Text as RichText
from torch import Tensor

from lorakin.errors import SettingError
from lorakin.storage.schema import Check, Positive
from lorakin.training.batches import SIDES, AnswerCollator, Row, answer_collator, texts_of
from lorakin.training.encoding import Encoded
from lorakin.training.formats import DPO, ORPO
from lorakin.training.metrics import figures, mean_interval
from lorakin.training.pairs import PairEncoder
from lorakin.training.reading import DataRows
from lorakin.training.tasks.answer_pairs import (
    Likelihoods,
    likelihoods,
    log_probabilities,
    side_by_side,
)
from lorakin.training.tasks.answer_task import AnswerTask, with_mask
from lorakin.training.tasks.task import Collator, Evaluation, RowAnswers
from lorakin.training.token_labels import IGNORED

Array = npt.NDArray[Any]
Share = Annotated[float, Check("a share in [0, 1]", lambda value: 0 <= value <= 1)]
Flipped = Annotated[float, Check("a share in [0, 0.5)", lambda value: 0 <= value < 0.5)]
PairLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@dataclasses.dataclass(frozen=True)
class PairCollator:
    """Makes batches of texts for a trainer of TRL, and of labelled texts for an evaluation.

    Attributes:
        answers: makes a batch with labels of texts, with logits at the labels alone.
        of_batch: makes of a batch with labels what the trainer takes.
    """

    answers: AnswerCollator
    of_batch: Callable[[dict[str, Tensor]], dict[str, Tensor]]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return self.of_batch(AnswerCollator(self.answers.pad, False)(side_by_side(rows)))


def _each_side(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a batch with the tensors of each side by its name, and those of both."""
    sides = {
        f"{side}_{key}": part
        for key, tensor in batch.items()
        for side, part in zip(SIDES, tensor.chunk(2), strict=True)
    }
    # The Trainer counts tokens by these.
    return sides | {key: batch[key] for key in ("input_ids", "attention_mask")}


def judged_pairs(
    losses: Array, rewards: Array, metrics: Sequence[str], intervals: bool
) -> Evaluation:
    """Returns the figures of pairs.

    Args:
        losses: (rows,).
        rewards: of the better and of the other answer, (rows, 2).
        metrics: the names of those that are wanted.
        intervals: whether to draw the rows again for 95 % intervals.
    """
    ones = np.ones(len(losses))
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    details = [
        {
            "chosen_reward": round(float(one), 6),
            "rejected_reward": round(float(other), 6),
            "won": SIDES[0] if one > other else SIDES[1] if one < other else "neither",
        }
        for one, other in rewards
    ]
    return Evaluation(
        float(losses.mean()),
        len(losses),
        figures(metrics, rejected, chosen, intervals),
        loss_interval=mean_interval(losses, ones) if intervals else None,
        answers=RowAnswers(losses, ones, numbers=(rejected, chosen), details=details),
    )


class PairTask(AnswerTask):
    """A better answer and another one, to the same prompt."""

    metrics: ClassVar[tuple[str, ...]] = ("reward_accuracy", "reward_margin")
    sides: ClassVar[int] = 2
    of_batch: ClassVar[Callable[[dict[str, Tensor]], dict[str, Tensor]]]

    def encode(self, rows: DataRows, tokenizer: Any, max_length: int, **options: Any) -> Encoded:
        return PairEncoder(rows, tokenizer, max_length, **options).pairs()

    def collator(self, model: Any, tokenizer: Any) -> Collator:
        return PairCollator(answer_collator(model, tokenizer), type(self).of_batch)

    def evaluate(
        self,
        model: Any,
        collate: Any,
        examples: Sequence[Row],
        batch_size: int,
        intervals: bool = False,
    ) -> Evaluation:
        losses, rewards = self.judge(model, collate.answers, examples, batch_size)
        return judged_pairs(losses, rewards, self.metrics, intervals)

    @abc.abstractmethod
    def judge(
        self, model: Any, collate: AnswerCollator, examples: Sequence[Row], batch_size: int
    ) -> tuple[Array, Array]:
        """Returns the losses of pairs, (rows,), and the rewards of both sides, (rows, 2)."""


class Dpo(PairTask):
    """Direct preference optimization, arXiv 2305.18290, and the losses that TRL has beside it."""

    word: ClassVar[str] = DPO
    module: ClassVar[str] = "trl.trainer.dpo_trainer"
    named: ClassVar[str] = "DPO"
    of_batch: ClassVar[Any] = staticmethod(with_mask)
    known: ClassVar[Mapping[str, Any]] = {
        "beta": Positive,
        "loss_type": list[PairLoss],
        "loss_weights": list[float],
        "label_smoothing": Flipped,
        "ld_alpha": Share,
        "f_divergence_type": Divergence,
        "f_alpha_divergence_coef": float,
        "use_weighting": bool,
        "discopop_tau": Positive,
    }

    def step_loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        from lorakin.training.tasks.answer_rehearsal import pair_step

        return pair_step(model, batch)

    def check(self, batch_size: int) -> None:
        super().check(batch_size)
        self._check_together()
        found = Likelihoods(
            np.full((1, 2, 2), -1.0, np.float32),
            np.full((1, 2, 2), -1.5, np.float32),
            np.full((1, 2), 2),
        )
        losses, _ = self._losses(found)
        if not np.isfinite(losses).all():
            raise SettingError(
                f"--task {self.word} with {self.arguments} has a loss that is {losses[0]}; "
                "exo_pair needs a --task-arg label_smoothing above 0"
            )

    def _check_together(self) -> None:
        """Checks what TRL checks only where it makes its trainer."""
        sorted_ones = {"aot", "aot_unpaired"} & set(self.settings.loss_type)
        of_both = {"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", *sorted_ones}
        if self.settings.use_weighting and sorted_ones:
            raise SettingError(f"use_weighting does not go with loss_type {min(sorted_ones)}")
        kind, others = self.settings.f_divergence_type, of_both & set(self.settings.loss_type)
        if kind != "reverse_kl" and others:
            raise SettingError(f"f_divergence_type {kind} does not go with loss_type {min(others)}")

    def judge(
        self, model: Any, collate: AnswerCollator, examples: Sequence[Row], batch_size: int
    ) -> tuple[Array, Array]:
        return self._losses(likelihoods(model, collate, examples, batch_size))

    def _losses(self, found: Likelihoods) -> tuple[Array, Array]:
        from lorakin.training.tasks.trl_losses import pair_losses

        return pair_losses(self.settings, found)


class Orpo(PairTask):
    """Monolithic preference optimization without a reference, arXiv 2403.07691."""

    word: ClassVar[str] = ORPO
    module: ClassVar[str] = "trl.experimental.orpo.orpo_trainer"
    named: ClassVar[str] = "ORPO"
    of_batch: ClassVar[Any] = staticmethod(_each_side)
    needs_reference: ClassVar[bool] = False
    known: ClassVar[Mapping[str, Any]] = {"beta": Positive}

    def rendered(self, example: Row, tokenizer: Any) -> RichText:
        # The better answer is imitated with its prompt; see `_read_whole`.
        chosen = example[SIDES[0]]
        return super().rendered(
            {**example, SIDES[0]: {**chosen, "labels": chosen["input_ids"]}}, tokenizer
        )

    def step_loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        from lorakin.training.tasks.answer_rehearsal import odds_step

        return odds_step(model, batch)

    def judge(
        self, model: Any, collate: AnswerCollator, examples: Sequence[Row], batch_size: int
    ) -> tuple[Array, Array]:
        from lorakin.training.tasks.trl_losses import odds_losses

        logps = log_probabilities(
            model, collate, [_read_whole(row) for row in examples], batch_size
        )
        means, nll = np.zeros((len(examples), 2)), np.zeros(len(examples))
        for n, row in enumerate(examples):
            for side, text in enumerate(texts_of(row)):
                learned = np.array(text["labels"][1:]) != IGNORED
                means[n, side] = logps[n, side, : len(learned)][learned].mean()
            length = len(row[SIDES[0]]["input_ids"]) - 1
            nll[n] = -logps[n, 0, :length].mean()
        return odds_losses(self.settings, means, nll)


def _read_whole(row: Row) -> Row:
    """Returns a row all of whose tokens are learned: the better answer's loss is over its prompt,
    too."""
    return {side: {**row[side], "labels": row[side]["input_ids"]} for side in SIDES}
