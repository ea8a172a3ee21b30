"""Answers in words from an encoder and a decoder, as T5 and BART write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import transformers
from rich.text import Text as RichText
from torch import Tensor

from lorakin.errors import DataError
from lorakin.terminal import visible
from lorakin.training.batches import Row, class_loss, label_losses
from lorakin.training.contents import Content, Conversation, PlainText, text_of
from lorakin.training.encoding import Encoded, NothingLearnedError
from lorakin.training.formats import SEQ2SEQ
from lorakin.training.reading import DataRows
from lorakin.training.records import Record
from lorakin.training.tasks.language import Language
from lorakin.training.tasks.task import Collator, Loss, Task
from lorakin.training.token_labels import IGNORED


@dataclasses.dataclass(frozen=True)
class Seq2Seq(Language):
    """The encoder reads the prompt; the decoder learns the answer, each token and the last one."""

    word: ClassVar[str] = SEQ2SEQ
    packs: ClassVar[bool] = False
    auto: ClassVar[str] = "AutoModelForSeq2SeqLM"

    def encode(self, rows: DataRows, tokenizer: Any, max_length: int, **options: Any) -> Encoded:
        examples, where, cut = [], [], 0
        for record in rows.records:
            prompt, answer = prompt_and_answer(record)
            ids = tokenizer(prompt, truncation=True, max_length=max_length)["input_ids"]
            labels = _target_ids(tokenizer, answer)
            cut += len(labels) > max_length
            if labels[:max_length]:
                examples.append({"input_ids": ids, "labels": labels[:max_length]})
                where.append(record.where)
        if not examples:
            raise NothingLearnedError(f"{rows.name}: no row has an answer")
        return Encoded(examples, len(rows) - len(examples), cut, where)

    def collator(self, model: Any, tokenizer: Any) -> Collator:
        # It makes the decoder's inputs of the labels, as the model's own forward would.
        collator: Collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=model)
        return collator

    @property
    def loss(self) -> Loss:
        return class_loss

    def full_batch(self, rows: int, length: int) -> dict[str, Tensor]:
        batch = Task.full_batch(self, rows, length)
        return batch | {"decoder_input_ids": batch["input_ids"]}

    def row_losses(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        return label_losses(outputs.logits, labels).sum(1), (labels != IGNORED).sum(1)

    def prompt(self, example: Row) -> Sequence[int]:
        prompt: Sequence[int] = example["input_ids"]
        return prompt

    def rendered(self, example: Row, tokenizer: Any) -> RichText:
        text = RichText(visible(tokenizer.decode(example["input_ids"])), style="dim")
        return text.append(f" → ⟦{visible(tokenizer.decode(example['labels']))}⟧", style="green")


def prompt_and_answer(record: Record) -> tuple[str, str]:
    """Returns what the encoder reads and what the decoder writes.

    Raises:
        DataError: the row is not one prompt and its answer.
    """
    content: Content = record.content
    if isinstance(content, PlainText) and content.prompt:
        return content.prompt, content.answer
    if isinstance(content, Conversation):
        roles = [message["role"] for message in content.messages]
        texts = [message.get("content") for message in content.messages]
        if roles == ["user", "assistant"]:
            return text_of(texts[0], "content"), text_of(texts[1], "content")
    raise DataError(
        f"{record.where}: an encoder and a decoder learn one prompt and its answer, and this row "
        f"(format {record.source.format.name}) is something else; give prompt and completion"
    )


def _target_ids(tokenizer: Any, answer: str) -> list[int]:
    """Returns the tokens of an answer, with the one that ends it."""
    ids: list[int] = list(tokenizer(text_target=answer)["input_ids"])
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
