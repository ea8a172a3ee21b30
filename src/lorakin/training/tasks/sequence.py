"""Answers to a whole text, or to a pair of texts: one class, several classes, or a number."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import transformers
from rich.text import Text as RichText
from torch import Tensor

from lorakin.errors import DataError
from lorakin.terminal import visible
from lorakin.training.batches import Row, class_loss
from lorakin.training.contents import Labelled
from lorakin.training.encoding import Encoded
from lorakin.training.metrics import figures, mean_interval
from lorakin.training.reading import DataRows
from lorakin.training.records import Record
from lorakin.training.tasks.by_row import results_by_row
from lorakin.training.tasks.task import Collator, Evaluation, Loss, RowAnswers, Task
from lorakin.waiting import tracked


@dataclasses.dataclass(frozen=True)
class SequenceTask(Task):
    """What the tasks of transformers' `…ForSequenceClassification` have in common."""

    labels: list[str]
    auto: ClassVar[str] = "AutoModelForSequenceClassification"

    def encode(self, rows: DataRows, tokenizer: Any, max_length: int, **options: Any) -> Encoded:
        examples = []
        for record in tracked(rows.records, "tokenising"):
            content = record.content
            if not isinstance(content, Labelled):
                raise DataError(f"{record.where}: format {record.source.format.name} has no class")
            texts = [content.text] if content.second is None else [content.text, content.second]
            encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
            encoded.pop("attention_mask", None)
            examples.append({**encoded, "labels": self.target(record)})
        return Encoded(examples, 0, where=[record.where for record in rows.records])

    @abc.abstractmethod
    def target(self, record: Record) -> Any:
        """Returns what the model must answer to a row, as a batch holds it.

        Raises:
            DataError: the row's label is no such thing.
        """

    @abc.abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of each row, (rows,), of float32 logits (rows, labels)."""

    @abc.abstractmethod
    def answers(self, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns what the logits (rows, labels) answer, in the form of the labels of a batch."""

    @abc.abstractmethod
    def written(self, answer: Any) -> str:
        """Returns an answer as text."""

    def collator(self, model: Any, tokenizer: Any) -> Collator:
        collator: Collator = transformers.DataCollatorWithPadding(tokenizer)
        return collator

    @property
    def loss(self) -> Loss:
        return self._mean_loss

    def _mean_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        losses = self.losses(outputs.logits.float(), labels.to(outputs.logits.device))
        # The Trainer counts every label: with several classes, one for each of them.
        labels_of_a_row = labels.numel() // len(labels)
        items = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return losses.sum() * labels_of_a_row / items

    def full_labels(self, rows: int, length: int) -> Tensor:
        return torch.zeros(rows, dtype=torch.long)

    def evaluate(
        self,
        model: Any,
        collate: Collator,
        examples: Sequence[Row],
        batch_size: int,
        intervals: bool = False,
    ) -> Evaluation:
        def of_batch(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = outputs.logits.float()
            return logits, self.losses(logits, labels).double()

        logits, by_row = results_by_row(model, collate, examples, batch_size, of_batch)
        given = self.answers(logits)
        right = np.asarray([example["labels"] for example in examples])

        ones = np.ones(len(by_row))
        expected, answered = (
            [self.written(answer) for answer in answers] for answers in (right, given)
        )
        return Evaluation(
            float(by_row.mean()),
            len(by_row),
            figures(self.metrics, right, given, intervals),
            loss_interval=mean_interval(by_row, ones) if intervals else None,
            answers=RowAnswers(by_row, ones, expected, answered, numbers=(right, given)),
        )

    def rendered(self, example: Row, tokenizer: Any) -> RichText:
        text = RichText(visible(tokenizer.decode(example["input_ids"])), style="dim")
        return text.append(f" → ⟦{visible(self.written(example['labels']))}⟧", style="green")


@dataclasses.dataclass(frozen=True)
class Classification(SequenceTask):
    """One class of several."""

    word: ClassVar[str] = "classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "matthews")

    def target(self, record: Record) -> int:
        label = record.label()
        record.check_known([label], self.labels)
        return self.labels.index(label)

    @property
    def loss(self) -> Loss:
        return class_loss

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def answers(self, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        best: npt.NDArray[Any] = logits.argmax(-1)
        return best

    def written(self, answer: Any) -> str:
        return self.labels[int(answer)]


@dataclasses.dataclass(frozen=True)
class MultiLabel(SequenceTask):
    """Any number of classes of several; a batch's labels are 0 or 1 for each class."""

    word: ClassVar[str] = "multi-label"
    metrics: ClassVar[tuple[str, ...]] = ("micro_f1", "macro_f1", "exact_match")

    def target(self, record: Record) -> list[float]:
        named = record.label_set()
        record.check_known(named, self.labels)
        return [float(label in named) for label in self.labels]

    def full_labels(self, rows: int, length: int) -> Tensor:
        return torch.zeros(rows, len(self.labels))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(-1)

    def answers(self, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return (logits > 0).astype(float)

    def written(self, answer: Any) -> str:
        chosen = [label for label, is_in in zip(self.labels, answer, strict=True) if is_in]
        return ", ".join(chosen) or "none"


@dataclasses.dataclass(frozen=True)
class Regression(SequenceTask):
    """A number. Its one label is a name for it."""

    word: ClassVar[str] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mean_absolute_error")

    def target(self, record: Record) -> float:
        return record.number_label()

    def full_labels(self, rows: int, length: int) -> Tensor:
        return torch.zeros(rows)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="none")

    def answers(self, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return logits.squeeze(-1)

    def written(self, answer: Any) -> str:
        return f"{float(answer):.4g}"
