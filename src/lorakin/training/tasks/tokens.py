"""A class for each word of a text, as in named-entity recognition."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from rich.text import Text as RichText
from torch import Tensor
from torch.utils.data import DataLoader

from lorakin.errors import DataError
from lorakin.inject.module_mode import in_mode
from lorakin.terminal import visible
from lorakin.training.batches import Row, class_loss
from lorakin.training.contents import Tagged
from lorakin.training.encoding import Encoded
from lorakin.training.formats import TOKEN_CLASSIFICATION
from lorakin.training.metrics import figures, mean_interval
from lorakin.training.reading import DataRows
from lorakin.training.tasks.task import Collator, Evaluation, Loss, RowAnswers, Task
from lorakin.training.token_labels import IGNORED


@dataclasses.dataclass(frozen=True)
class TokenClassification(Task):
    """Each word's class is learned at its first token; a batch's other labels are -100."""

    labels: list[str]
    word: ClassVar[str] = TOKEN_CLASSIFICATION
    unit: ClassVar[str] = "words"
    auto: ClassVar[str] = "AutoModelForTokenClassification"
    metrics: ClassVar[tuple[str, ...]] = ("macro_f1", "accuracy")

    def encode(self, rows: DataRows, tokenizer: Any, max_length: int, **options: Any) -> Encoded:
        if not tokenizer.is_fast:
            raise DataError(
                f"token classification needs a fast tokenizer, which knows of which word a token "
                f"is, and {type(tokenizer).__name__} is none"
            )
        numbers = {label: number for number, label in enumerate(self.labels)}
        examples, cut = [], 0
        for record in rows.records:
            content = record.content
            if not isinstance(content, Tagged):
                raise DataError(f"{record.where}: format {record.source.format.name} has no tags")
            tags = record.tags()
            if unknown := [tag for tag in tags if tag not in numbers]:
                raise DataError(
                    f"{record.where}: tag {unknown[0]!r} is none of {', '.join(self.labels)}"
                )
            encoded = tokenizer(
                content.words, is_split_into_words=True, truncation=True, max_length=max_length
            )
            words = encoded.word_ids()
            starts = [n for n, word in enumerate(words) if word not in (None, *words[:n][-1:])]
            labels = [IGNORED] * len(words)
            for n in starts:
                labels[n] = numbers[tags[words[n]]]
            cut += len(starts) < len(content.words)
            fields = {key: value for key, value in encoded.items() if key != "attention_mask"}
            examples.append({**fields, "labels": labels})
        return Encoded(examples, 0, cut, [record.where for record in rows.records])

    def collator(self, model: Any, tokenizer: Any) -> Collator:
        collator: Collator = transformers.DataCollatorForTokenClassification(tokenizer)
        return collator

    @property
    def loss(self) -> Loss | None:
        return class_loss

    def _losses(self, outputs: Any, labels: Tensor) -> Tensor:
        """Returns the loss of each token, (rows, tokens), 0 where there is no label."""
        labels = labels.to(outputs.logits.device)
        logits = outputs.logits.float().flatten(0, 1)
        losses = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view(labels.shape)

    @torch.no_grad()
    def evaluate(
        self,
        model: Any,
        collate: Collator,
        examples: Sequence[Row],
        batch_size: int,
        intervals: bool = False,
    ) -> Evaluation:
        order = sorted(range(len(examples)), key=lambda n: -len(examples[n]["input_ids"]))
        losses: list[float] = []
        given: list[list[int]] = []
        right: list[list[int]] = []
        with in_mode(model, training=False):
            ordered: Any = [examples[n] for n in order]
            for batch in DataLoader(ordered, batch_size=batch_size, collate_fn=collate):
                batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
                labels = batch.pop("labels")
                outputs = model(**batch)
                losses += self._losses(outputs, labels).sum(1).tolist()
                for row, answers in zip(labels, outputs.logits.argmax(-1), strict=True):
                    is_word = row != IGNORED
                    right.append(row[is_word].tolist())
                    given.append(answers[is_word].tolist())
        back = np.argsort(order)
        by_row = np.array(losses)[back]
        counts = np.array([len(right[n]) for n in back])
        flat_right, flat_given = (
            np.array([label for n in back for label in part[n]]) for part in (right, given)
        )
        return Evaluation(
            float(by_row.sum() / counts.sum()),
            int(counts.sum()),
            figures(self.metrics, flat_right, flat_given, intervals),
            loss_interval=mean_interval(by_row, counts) if intervals else None,
            answers=RowAnswers(
                by_row,
                counts,
                [self._written(right[n]) for n in back],
                [self._written(given[n]) for n in back],
                numbers=(flat_right, flat_given),
            ),
        )

    def _written(self, answers: Sequence[int]) -> str:
        return " ".join(self.labels[number] for number in answers)

    def rendered(self, example: Row, tokenizer: Any) -> RichText:
        text = RichText()
        for token, label in zip(example["input_ids"], example["labels"], strict=True):
            text.append(visible(tokenizer.decode([token])) + " ", style="dim")
            if label != IGNORED:
                text.append(f"⟦{visible(self.labels[label])}⟧ ", style="green")
        return text
