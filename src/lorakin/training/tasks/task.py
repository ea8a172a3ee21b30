"""What a run learns: how its rows become tokens and batches, and how the answers are judged."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt
import torch
from rich.text import Text as RichText
from torch import Tensor

from lorakin.training.batches import Row
from lorakin.training.metrics import METRICS, MetricValue, as_plain
from lorakin.training.tasks.trainer_kind import TrainerKind

if TYPE_CHECKING:
    from lorakin.training.encoding import Encoded
    from lorakin.training.reading import DataRows

Loss = Callable[[Any, Tensor, Any], Tensor]
"""A function (outputs, labels, number of items in the whole batch) → the loss, as the Trainer's."""
Collator = Callable[[Sequence[Row]], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class RowAnswers:
    """A model's answers to rows, in the rows' order.

    Attributes:
        losses: each row's loss, summed over its items, (rows,).
        counts: each row's number of items, such as answer tokens, (rows,).
        right, given: the right and the given answer of each row, as text; empty for a language
            model, which is only asked for its loss.
        where: each row's place in the data, if it is known.
        numbers: the right and the given answers as the metrics take them, (rows,), (rows, classes)
            or (words,) each; None for a language model.
        groups: a number for each row, where rows with the same one belong together, such as the
            right answers to one prompt; empty if each row stands alone.
        details: what else is known of each row, by name, such as the rewards of two answers.
    """

    losses: npt.NDArray[Any]
    counts: npt.NDArray[Any]
    right: list[str] = dataclasses.field(default_factory=list)
    given: list[str] = dataclasses.field(default_factory=list)
    where: list[str] = dataclasses.field(default_factory=list)
    numbers: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    groups: list[int] = dataclasses.field(default_factory=list)
    details: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out figures.

    Attributes:
        loss: the mean loss per answer token or, for a classifier, per row.
        count: over how many.
        metrics: the task's metrics by name; empty for a language model.
        perplexity: exp(loss) of a language model, None for other tasks.
        loss_interval: the loss's 95 % interval over draws of the rows, if it was taken.
        answers: what the figures come from; None if they were read from a file.
        note: what was evaluated, in words, where the rows do not say it all; see `Task.note`.
    """

    loss: float
    count: int
    metrics: Mapping[str, MetricValue] = dataclasses.field(default_factory=dict)
    perplexity: float | None = None
    loss_interval: tuple[float, float] | None = None
    answers: RowAnswers | None = dataclasses.field(default=None, repr=False, compare=False)
    note: str = ""

    def as_dict(self) -> dict[str, float]:
        """Returns the figures by name, without those that do not apply."""
        named = {"loss": self.loss, "perplexity": self.perplexity, "count": self.count}
        if self.loss_interval is not None:
            named |= dict(zip(("loss_low", "loss_high"), self.loss_interval, strict=True))
        return {
            name: value
            for name, value in (named | as_plain(self.metrics)).items()
            if value is not None
        }

    @property
    def only_answer(self) -> str | None:
        """The answer that every row was given, where several are right; None if there are more."""
        answers = self.answers
        if answers is None or len(set(answers.given)) != 1 or len(set(answers.right)) == 1:
            return None
        return answers.given[0]

    @classmethod
    def of_dict(cls, figures: Mapping[str, float]) -> Evaluation:
        """Returns the evaluation that `as_dict` gave these figures of, without intervals.

        >>> Evaluation.of_dict({"loss": 0.5, "count": 4, "accuracy": 0.75}).accuracy
        0.75
        """
        others = {name: MetricValue(value) for name, value in figures.items() if name in METRICS}
        return cls(
            figures["loss"], int(figures["count"]), others, perplexity=figures.get("perplexity")
        )

    @property
    def has_winners(self) -> bool:
        """Whether of each row one of two answers got the higher reward."""
        return "reward_accuracy" in self.metrics

    @property
    def accuracy(self) -> float | None:
        """The share of right answers, None where a task has none."""
        return self.metrics["accuracy"].value if "accuracy" in self.metrics else None


class Task(abc.ABC):
    """One kind of learning. `labels` are a classifier's classes; None for a language model."""

    word: ClassVar[str]
    """What `--task` calls it."""
    auto: ClassVar[str] = "AutoModelForCausalLM"
    """The class of transformers that loads its models."""
    metrics: ClassVar[tuple[str, ...]] = ()
    """The names of its metrics; the first is the one that decides, unless the user says another."""
    labels: list[str] | None = None
    packs: ClassVar[bool] = False
    """Whether several of its rows can share a sequence."""
    needs_reference: ClassVar[bool] = False
    """Whether answers are compared with those of the model as it was before training."""

    @property
    def takes_template(self) -> bool:
        """Whether its rows go through the chat template."""
        return self.labels is None

    @property
    def note(self) -> str:
        """What the user should know about it before training; empty if the rows say it all."""
        return ""

    def line(self, reference: str) -> str:
        """Returns `note` with what answers are compared with, if they are."""
        return f"{self.note}; compared with {reference}" if self.needs_reference else self.note

    @property
    def trainer(self) -> TrainerKind:
        """The Trainer that trains it."""
        return TrainerKind()

    def check(self, batch_size: int) -> None:  # noqa: B027
        """Checks the trainer's arguments before anything is loaded.

        Args:
            batch_size: rows in a batch.

        Raises:
            SettingError: they contradict each other, or a package is missing.
        """

    def check_examples(self, examples: Sequence[Row], name: str) -> None:  # noqa: B027
        """Checks that there is something to learn of tokenised rows.

        Raises:
            DataError: there is not.
        """

    def probed(self, row: Row) -> Row:
        """Returns what methods look at of a row that measure the data before they start."""
        return row

    def probe_collator(self, model: Any, tokenizer: Any) -> Collator:
        """Returns the function that makes a batch of what they look at."""
        return self.collator(model, tokenizer)

    def texts(self, row: Row, tokenizer: Any) -> dict[str, str]:
        """Returns the answers in a tokenised row, by name; none where one answer is right."""
        return {}

    @abc.abstractmethod
    def encode(self, rows: DataRows, tokenizer: Any, max_length: int, **options: Any) -> Encoded:
        """Tokenises rows.

        Raises:
            DataError: a row that does not fit the task.
        """

    @abc.abstractmethod
    def collator(self, model: Any, tokenizer: Any) -> Collator:
        """Returns the function that makes a batch of tokenised rows."""

    @property
    @abc.abstractmethod
    def loss(self) -> Loss:
        """The loss of a batch."""

    def full_batch(self, rows: int, length: int) -> dict[str, Tensor]:
        """Returns a batch of rows of full length, as `collator`'s: what `plan` rehearses with."""
        ids = torch.ones(rows, length, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": ids, "labels": self.full_labels(rows, length)}

    def step_loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss of a batch of `full_batch` as its Trainer takes it: what `plan` runs."""
        inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
        return self.loss(model(**inputs), batch.get("labels"), None)  # type: ignore[arg-type]

    def evaluation_loss(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Returns the loss of such a batch as an evaluation takes it."""
        return self.step_loss(model, batch)

    def full_labels(self, rows: int, length: int) -> Tensor:
        """Returns the labels of `full_batch`: by default one for each token, (rows, length)."""
        return torch.zeros(rows, length, dtype=torch.long)

    @abc.abstractmethod
    def evaluate(
        self,
        model: Any,
        collate: Collator,
        examples: Sequence[Row],
        batch_size: int,
        intervals: bool = False,
    ) -> Evaluation:
        """Evaluates a model on tokenised rows.

        Args:
            model: a transformers model, on its device.
            collate: what `collator` returned.
            examples: the rows.
            batch_size: rows at a time.
            intervals: whether to draw the rows again for 95 % intervals.
        """

    @abc.abstractmethod
    def rendered(self, example: Row, tokenizer: Any) -> RichText:
        """Returns an example as text, with what is learned of it in ⟦ ⟧."""
