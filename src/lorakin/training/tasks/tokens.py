"""A class for each word of a text, as in named-entity recognition."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
import transformers
from rich.text import Text as RichText
from torch import Tensor

from lorakin.errors import DataError
from lorakin.terminal import visible
from lorakin.training.batches import Row, class_loss, label_losses
from lorakin.training.contents import Tagged
from lorakin.training.encoding import Encoded
from lorakin.training.formats import TOKEN_CLASSIFICATION
from lorakin.training.metrics import figures, mean_interval
from lorakin.training.reading import DataRows
from lorakin.training.tasks.by_row import results_by_row
from lorakin.training.tasks.task import Collator, Evaluation, Loss, RowAnswers, Task
from lorakin.training.token_labels import IGNORED


@dataclasses.dataclass(frozen=True)
class TokenClassification(Task):
    """Each word's class is learned at its first token; a batch's other labels are -100."""

    labels: list[str]
    word: ClassVar[str] = TOKEN_CLASSIFICATION
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
            record.check_known(tags, self.labels, "tag")
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
    def loss(self) -> Loss:
        return class_loss

    def evaluate(
        self,
        model: Any,
        collate: Collator,
        examples: Sequence[Row],
        batch_size: int,
        intervals: bool = False,
    ) -> Evaluation:
        longest = max(len(example["input_ids"]) for example in examples)

        def of_batch(outputs: Any, labels: Tensor) -> tuple[Tensor, ...]:
            losses = label_losses(outputs.logits, labels).sum(1).double()
            # Batches have rows of other lengths.
            missing = (0, longest - labels.shape[1])
            answers = F.pad(outputs.logits.argmax(-1), missing)
            return losses, F.pad(labels, missing, value=IGNORED), answers

        by_row, labels, answers = results_by_row(model, collate, examples, batch_size, of_batch)
        is_word = labels != IGNORED
        counts = is_word.sum(1)
        flat_right, flat_given = labels[is_word], answers[is_word]
        right, given = (
            [self._written(row[mask]) for row, mask in zip(numbers, is_word, strict=True)]
            for numbers in (labels, answers)
        )
        return Evaluation(
            float(by_row.sum() / counts.sum()),
            int(counts.sum()),
            figures(self.metrics, flat_right, flat_given, intervals),
            loss_interval=mean_interval(by_row, counts) if intervals else None,
            answers=RowAnswers(
                by_row,
                counts,
                right,
                given,
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
