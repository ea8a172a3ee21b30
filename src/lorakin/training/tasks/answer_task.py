"""What the tasks of TRL's trainers for language models have in common."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from rich.text import Text as RichText
from torch import Tensor

from lorakin.errors import SettingError
from lorakin.terminal import visible
from lorakin.training.batches import SIDES, Row, answer_collator, answer_loss, texts_of
from lorakin.training.preference_trainer import (
    QUIET,
    OwnRows,
    alone,
    check_unsharded,
    reference_of,
)
from lorakin.training.tasks.language import Language
from lorakin.training.tasks.task import Collator, Loss, Task
from lorakin.training.tasks.trainer_kind import TrainerKind, checked_arguments, from_trl
from lorakin.training.token_labels import IGNORED


def chosen_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Returns the loss of answers to imitate, for methods that look at the data before they start.

    It has no label smoothing: the trainer's own loss has none.
    """
    return answer_loss(outputs, labels, num_items_in_batch)


@dataclasses.dataclass(frozen=True)
class TrlTask(Task):
    """What the tasks of TRL's trainers have in common.

    Attributes:
        arguments: those of TRL's trainer, by name.
    """

    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    known: ClassVar[Mapping[str, Any]] = {}
    """The arguments that a user can give → their types."""
    module: ClassVar[str]
    """The module of TRL that has the trainer."""
    named: ClassVar[str]
    """How the names of the trainer's class and of its arguments' class begin."""

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "arguments", checked_arguments(self.arguments, self.known, self.word)
        )

    @property
    def from_package(self) -> tuple[Any, Any]:
        """The trainer's class and that of its arguments."""
        module = from_trl(self.module, self.word)
        return getattr(module, f"{self.named}Trainer"), getattr(module, f"{self.named}Config")

    def texts(self, row: Row, tokenizer: Any) -> dict[str, str]:
        return {
            side: said(text, tokenizer) for side, text in zip(SIDES, texts_of(row), strict=False)
        }


class AnswerTask(TrlTask):
    """What the tasks of TRL's trainers for language models have in common."""

    needs_reference: ClassVar[bool] = True
    sides: ClassVar[int] = 1
    """How many texts a row has."""

    @functools.cached_property
    def settings(self) -> Any:
        """The trainer's arguments without a run, as TRL checked them.

        Raises:
            SettingError: they contradict each other.
        """
        _, config = self.from_package  # it says whether TRL is there
        from lorakin.training.tasks.trl_losses import settings_of

        try:
            return settings_of(config, "unused", self.arguments)
        except (ValueError, NotImplementedError) as error:
            raise SettingError(f"--task {self.word}: {error}") from None

    @property
    def trainer(self) -> TrainerKind:
        options = reference_of if self.needs_reference else alone
        return TrainerKind(*self.from_package, {**self.arguments, **QUIET}, (OwnRows,), options)

    def check(self, batch_size: int) -> None:
        if self.needs_reference:
            check_unsharded(self.word)

    @property
    def note(self) -> str:
        loss = getattr(self.settings, "loss_type", None)
        named = (
            "" if loss is None else f", loss {loss if isinstance(loss, str) else ' + '.join(loss)}"
        )
        return f"{self.word}: beta {self.settings.beta:g}{named}"

    @property
    def loss(self) -> Loss:
        return chosen_loss

    def full_batch(self, rows: int, length: int) -> dict[str, Tensor]:
        from lorakin.training.tasks.answer_rehearsal import full_texts

        return full_texts(self.sides * rows, length)

    def evaluation_loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        # As many texts at a time as a language model's rows.
        texts = max(self.sides, len(batch["input_ids"]) // self.sides)
        part = {key: tensor[:texts] for key, tensor in batch.items()}
        labels = part.pop("labels")
        return chosen_loss(model(**part), labels)

    def probed(self, row: Row) -> Row:
        return texts_of(row)[0]

    def probe_collator(self, model: Any, tokenizer: Any) -> Collator:
        return answer_collator(model, tokenizer)

    def rendered(self, example: Row, tokenizer: Any) -> RichText:
        parts = []
        for side, text in zip(SIDES, texts_of(example), strict=False):
            parts.append(RichText(f"{side}: ", style="bold"))
            parts.append(Language().rendered(text, tokenizer))
            parts.append(RichText("\n"))
        return RichText.assemble(*parts[:-1])


def said(text: Row, tokenizer: Any) -> str:
    """Returns what is learned of a tokenised text, in words."""
    ids = [n for n, label in zip(text["input_ids"], text["labels"], strict=True) if label >= 0]
    return visible(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def with_mask(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a batch in which a mask, instead of labels, says what is learned."""
    mask = (batch["labels"] != IGNORED).long()
    return {key: batch[key] for key in ("input_ids", "attention_mask")} | {"completion_mask": mask}
