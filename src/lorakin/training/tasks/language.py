"""Answers in words: a language model's loss on them."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from rich.text import Text as RichText
from torch import Tensor
from torch.utils.data import DataLoader

from lorakin.inject.module_mode import in_mode
from lorakin.terminal import visible
from lorakin.training.batches import AnswerCollator, Row, answer_loss, row_losses
from lorakin.training.encoding import Encoded, encode
from lorakin.training.metrics import mean_interval
from lorakin.training.reading import DataRows
from lorakin.training.tasks.task import Collator, Evaluation, Loss, RowAnswers, Task
from lorakin.training.token_labels import IGNORED
from lorakin.waiting import tracked


@dataclasses.dataclass(frozen=True)
class Language(Task):
    """A causal language model that learns to write answers."""

    word: ClassVar[str] = "language"
    unit: ClassVar[str] = "answer tokens"

    def encode(self, rows: DataRows, tokenizer: Any, max_length: int, **options: Any) -> Encoded:
        return encode(rows, tokenizer, max_length, **options)

    def collator(self, model: Any, tokenizer: Any) -> Collator:
        # Logits are asked for at the answers alone, if the model's forward can do that.
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        return AnswerCollator(pad, "logits_to_keep" in inspect.signature(model.forward).parameters)

    @property
    def loss(self) -> Loss | None:
        return answer_loss

    def row_losses(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the summed loss and the number of labelled tokens of each row, both (rows,)."""
        return row_losses(outputs, labels), (labels[:, 1:] != IGNORED).sum(1)

    @torch.no_grad()
    def evaluate(
        self,
        model: Any,
        collate: Collator,
        examples: Sequence[Row],
        batch_size: int,
        intervals: bool = False,
    ) -> Evaluation:
        # The longest rows first: batches hold little padding then, and a model that is too large
        # for the memory fails at once.
        order = sorted(range(len(examples)), key=lambda n: -len(examples[n]["input_ids"]))
        ordered: Any = [examples[n] for n in order]
        totals: list[Tensor] = []
        counts: list[Tensor] = []
        with in_mode(model, training=False):
            batches: Any = DataLoader(ordered, batch_size=batch_size, collate_fn=collate)
            for batch in tracked(batches, "evaluating", len(batches)):
                batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
                labels = batch.pop("labels")
                losses, numbers = self.row_losses(model(**batch), labels)
                totals.append(losses)
                counts.append(numbers)
        back = np.argsort(order)
        by_row = torch.cat(totals).double().cpu().numpy()[back]
        tokens = torch.cat(counts).cpu().numpy()[back]
        loss = float(by_row.sum() / tokens.sum())
        return Evaluation(
            loss,
            int(tokens.sum()),
            perplexity=math.exp(min(loss, 700)),
            loss_interval=mean_interval(by_row, tokens) if intervals else None,
            answers=RowAnswers(by_row, tokens),
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
