"""Preference tuning by TRL from answers that are good or not (KTO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from rich.text import Text as RichText
from torch import Tensor

from lorakin.errors import DataError, SettingError
from lorakin.storage.schema import NotNegative, Positive
from lorakin.training.batches import GOOD, AnswerCollator, Row, answer_collator
from lorakin.training.encoding import Encoded
from lorakin.training.formats import KTO
from lorakin.training.metrics import figures, mean_interval
from lorakin.training.pairs import ROOM, PairEncoder, prompt_length
from lorakin.training.reading import DataRows
from lorakin.training.tasks.answer_pairs import likelihoods
from lorakin.training.tasks.answer_task import AnswerTask, said, with_mask
from lorakin.training.tasks.language import Language
from lorakin.training.tasks.task import Collator, Evaluation, RowAnswers
from lorakin.training.tasks.trainer_kind import TrainerKind

WITH_KL = "kto"
"""The loss that looks at answers to other prompts."""


@dataclasses.dataclass(frozen=True)
class JudgedCollator:
    """Makes batches of answers that are good or not, with answers to other prompts beside them.

    Attributes:
        answers: makes a batch with labels of texts.
        with_others: whether each prompt also gets the answer of the row before it.
    """

    answers: AnswerCollator
    with_others: bool

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        collate = AnswerCollator(self.answers.pad, False)
        batch = with_mask(collate(rows))
        if self.with_others:
            others = with_mask(collate(mismatched(rows)))
            batch |= {f"KL_{key}": tensor for key, tensor in others.items()}
        return batch | {"label": torch.tensor([bool(row[GOOD]) for row in rows])}


def mismatched(rows: Sequence[Row]) -> list[Row]:
    """Returns each row's prompt with the answer of the row before it, as KTO's KL term takes it."""
    found: list[Row] = []
    for n, row in enumerate(rows):
        start, other = prompt_length(row), rows[n - 1]
        place = slice(prompt_length(other), prompt_length(other) + row[ROOM])
        answer = {key: other[key][place] for key in ("input_ids", "labels")}
        found.append({key: [*row[key][:start], *answer[key]] for key in answer})
    return found


class Kto(AnswerTask):
    """Kahneman-Tversky optimization, arXiv 2402.01306."""

    word: ClassVar[str] = KTO
    module: ClassVar[str] = "trl.trainer.kto_trainer"
    named: ClassVar[str] = "KTO"
    metrics: ClassVar[tuple[str, ...]] = ("reward_accuracy", "reward_margin")
    known: ClassVar[Mapping[str, Any]] = {
        "beta": Positive,
        "loss_type": Literal["kto", "apo_zero_unpaired"],
        "desirable_weight": NotNegative,
        "undesirable_weight": NotNegative,
    }

    @property
    def trainer(self) -> TrainerKind:
        return dataclasses.replace(super().trainer, order="sequential")

    def step_loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        from lorakin.training.tasks.answer_rehearsal import verdict_step

        return verdict_step(model, batch)

    def check(self, batch_size: int) -> None:
        super().check(batch_size)
        if not self.settings.desirable_weight + self.settings.undesirable_weight:
            raise SettingError("desirable_weight and undesirable_weight are both 0: nothing learns")
        if batch_size < 2 and self.settings.loss_type == WITH_KL:
            raise SettingError(
                f"--task {self.word} compares answers within a batch, so --batch-size must be at "
                f"least 2, not {batch_size}"
            )

    def encode(self, rows: DataRows, tokenizer: Any, max_length: int, **options: Any) -> Encoded:
        return PairEncoder(rows, tokenizer, max_length, **options).judged()

    def check_examples(self, examples: Sequence[Row], name: str) -> None:
        verdicts = {bool(row[GOOD]) for row in examples}
        if len(verdicts) == 1:
            word = "good" if verdicts == {True} else "bad"
            raise DataError(
                f"{name}: an empty preference: all {len(examples)} answers are {word}, so there is "
                "nothing to prefer; give rows with both, or imitate answers with --format "
                "prompt/completion"
            )

    def collator(self, model: Any, tokenizer: Any) -> Collator:
        with_others = self.settings.loss_type == WITH_KL
        return JudgedCollator(answer_collator(model, tokenizer), with_others)

    def evaluate(
        self,
        model: Any,
        collate: Any,
        examples: Sequence[Row],
        batch_size: int,
        intervals: bool = False,
    ) -> Evaluation:
        from lorakin.training.tasks.trl_losses import answer_losses

        found = likelihoods(model, collate.answers, examples, batch_size)
        kl = 0.0
        if collate.with_others:
            others = likelihoods(model, collate.answers, mismatched(examples), batch_size)
            kl = max(0.0, float((others.policy - others.reference).sum((1, 2)).mean()))
        good = [bool(row[GOOD]) for row in examples]
        losses, rewards = answer_losses(self.settings, found, good, kl)

        ones, signed = np.ones(len(losses)), np.where(good, rewards, -rewards)
        details = [
            {"good": is_good, "reward": round(float(reward), 6)}
            for is_good, reward in zip(good, rewards, strict=True)
        ]
        numbers = (np.zeros(len(losses)), signed)
        return Evaluation(
            float(losses.mean()),
            len(losses),
            figures(self.metrics, *numbers, intervals),
            loss_interval=mean_interval(losses, ones) if intervals else None,
            answers=RowAnswers(losses, ones, numbers=numbers, details=details),
        )

    def texts(self, row: Row, tokenizer: Any) -> dict[str, str]:
        return {"answer": said(row, tokenizer)}

    def rendered(self, example: Row, tokenizer: Any) -> RichText:
        word = "good" if example[GOOD] else "bad"
        text = RichText(f"{word}: ", style="bold")
        return text.append_text(Language().rendered(example, tokenizer))
