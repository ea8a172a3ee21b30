"""Reward models by TRL: a number for an answer, higher for the better of two."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from rich.text import Text as RichText
from torch import Tensor

from lorakin.storage.schema import NotNegative
from lorakin.terminal import visible
from lorakin.training.batches import SIDES, Row, pad_id, texts_of
from lorakin.training.encoding import Encoded
from lorakin.training.formats import REWARD
from lorakin.training.pairs import PairEncoder
from lorakin.training.preference_trainer import QUIET, OwnRows, alone
from lorakin.training.reading import DataRows
from lorakin.training.tasks.answer_pairs import side_by_side
from lorakin.training.tasks.answer_task import TrlTask
from lorakin.training.tasks.by_row import results_by_row
from lorakin.training.tasks.preference import judged_pairs
from lorakin.training.tasks.task import Collator, Evaluation, Loss
from lorakin.training.tasks.trainer_kind import TrainerKind


@dataclasses.dataclass(frozen=True)
class Reward(TrlTask):
    """A model with one number for each text (Bradley-Terry).

    Attributes:
        labels: the name of that number.
    """

    labels: list[str] = dataclasses.field(default_factory=lambda: [REWARD])
    word: ClassVar[str] = REWARD
    module: ClassVar[str] = "trl.trainer.reward_trainer"
    named: ClassVar[str] = "Reward"
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    metrics: ClassVar[tuple[str, ...]] = ("reward_accuracy", "reward_margin")
    known: ClassVar[Mapping[str, Any]] = {"center_rewards_coefficient": NotNegative}

    @property
    def takes_template(self) -> bool:
        return True

    @property
    def note(self) -> str:
        return f"{self.word}: one number for each answer"

    @property
    def trainer(self) -> TrainerKind:
        return TrainerKind(*self.from_package, {**self.arguments, **QUIET}, (OwnRows,), alone)

    def check(self, batch_size: int) -> None:
        _ = self.from_package  # it says whether TRL is there

    def encode(self, rows: DataRows, tokenizer: Any, max_length: int, **options: Any) -> Encoded:
        # An answer without its end would be judged for what it does not say.
        return PairEncoder(rows, tokenizer, max_length, **options).pairs(whole=True)

    def collator(self, model: Any, tokenizer: Any) -> Collator:
        return functools.partial(_padded, pad_id(tokenizer))

    @property
    def loss(self) -> Loss:
        return _mean_loss

    def full_batch(self, rows: int, length: int) -> dict[str, Tensor]:
        ids = torch.ones(2 * rows, length, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids}

    def evaluate(
        self,
        model: Any,
        collate: Collator,
        examples: Sequence[Row],
        batch_size: int,
        intervals: bool = False,
    ) -> Evaluation:
        def of_batch(outputs: Any, labels: Any) -> tuple[Tensor, ...]:
            return _rewards(outputs).chunk(2)

        sides = results_by_row(model, collate, examples, batch_size, of_batch)
        rewards = np.stack(sides, axis=1)
        losses = _losses(torch.from_numpy(rewards), self._centre).numpy()
        return judged_pairs(losses, rewards, self.metrics, intervals)

    @property
    def _centre(self) -> float:
        return float(self.arguments.get("center_rewards_coefficient") or 0.0)

    def rendered(self, example: Row, tokenizer: Any) -> RichText:
        text = RichText()
        for side, one in zip(SIDES, texts_of(example), strict=True):
            words = visible(tokenizer.decode(one["input_ids"]))
            text.append(f"{side}: ", style="bold").append(f"⟦{words}⟧\n", style="green")
        text.right_crop(1)
        return text


def _rewards(outputs: Any) -> Tensor:
    rewards: Tensor = outputs.logits.squeeze(-1).float()
    return rewards


def _losses(rewards: Tensor, centre: float = 0.0) -> Tensor:
    """Returns the loss of each pair of rewards, (rows,) of (rows, 2), as TRL's trainer takes it."""
    chosen, rejected = rewards.double().unbind(1)
    return -F.logsigmoid(chosen - rejected) + centre * (chosen + rejected) ** 2


def _mean_loss(outputs: Any, labels: Any = None, num_items_in_batch: Any = None) -> Tensor:
    sides = torch.stack(_rewards(outputs).chunk(2), dim=1)
    return _losses(sides).mean()


def _padded(pad: int, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Returns a batch of the first sides of all rows, then of the others, padded on the right."""
    texts = [{k: v for k, v in text.items() if k != "labels"} for text in side_by_side(rows)]
    batch = {}
    for key in texts[0]:
        parts = [torch.tensor(text[key]) for text in texts]
        fill = pad if key == "input_ids" else 0
        batch[key] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(text["input_ids"]) for text in texts])
    mask = torch.arange(batch["input_ids"].shape[1])[None] < lengths[:, None]
    return {**batch, "attention_mask": mask.long()}
