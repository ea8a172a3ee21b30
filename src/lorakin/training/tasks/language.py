"""Answers in words: a language model's loss on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from rich.text import Text as RichText
from torch import Tensor

from lorakin.terminal import visible
from lorakin.training.batches import (
    AnswerCollator,
    Row,
    answer_collator,
    answer_loss,
    row_losses,
)
from lorakin.training.encoding import Encoded, encode
from lorakin.training.metrics import mean_interval, prompt_groups
from lorakin.training.reading import DataRows
from lorakin.training.tasks.by_row import results_by_row
from lorakin.training.tasks.task import Collator, Evaluation, Loss, RowAnswers, Task
from lorakin.training.token_labels import IGNORED


@dataclasses.dataclass(frozen=True)
class Language(Task):
    """A causal language model that learns to write answers."""

    word: ClassVar[str] = "language"
    packs: ClassVar[bool] = True

    def encode(self, rows: DataRows, tokenizer: Any, max_length: int, **options: Any) -> Encoded:
        return encode(rows, tokenizer, max_length, **options)

    def collator(self, model: Any, tokenizer: Any) -> Collator:
        return answer_collator(model, tokenizer)

    @property
    def loss(self) -> Loss:
        return answer_loss

    def full_batch(self, rows: int, length: int) -> dict[str, Tensor]:
        row = [1] * length  # all of them answers
        return AnswerCollator(0)([{"input_ids": row, "labels": row}] * rows)

    def row_losses(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the summed loss and the number of labelled tokens of each row, both (rows,)."""
        return row_losses(outputs, labels), (labels[:, 1:] != IGNORED).sum(1)

    def prompt(self, example: Row) -> Sequence[int]:
        """Returns the tokens that the model is given before the first one that it learns."""
        labels = example["labels"]
        learned = next((at for at, label in enumerate(labels) if label != IGNORED), len(labels))
        prompt: Sequence[int] = example["input_ids"][:learned]
        return prompt

    def evaluate(
        self,
        model: Any,
        collate: Collator,
        examples: Sequence[Row],
        batch_size: int,
        intervals: bool = False,
    ) -> Evaluation:
        def of_batch(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
            losses, counts = self.row_losses(outputs, labels)
            return losses.double(), counts

        by_row, tokens = results_by_row(model, collate, examples, batch_size, of_batch)
        loss = float(by_row.sum() / tokens.sum())
        groups = prompt_groups([self.prompt(example) for example in examples])
        return Evaluation(
            loss,
            int(tokens.sum()),
            perplexity=math.exp(min(loss, 700)),
            loss_interval=mean_interval(by_row, tokens, groups) if intervals else None,
            answers=RowAnswers(by_row, tokens, groups=groups),
        )

    def rendered(self, example: Row, tokenizer: Any) -> RichText:
        text = RichText()
        ids, learned = example["input_ids"], [label != IGNORED for label in example["labels"]]
        edges = [at for at in range(1, len(ids)) if learned[at] != learned[at - 1]]
        shown = ""
        for start, end in zip([0, *edges], [*edges, len(ids)], strict=True):
            before = shown
            # Decoding a part alone would lose the space before it.
            shown = tokenizer.decode(ids[:end])
            words = visible(shown[len(before) :])
            style = "green" if learned[start] else "dim"
            text.append(f"⟦{words}⟧" if learned[start] else words, style=style)
        return text
