"""How well a model predicts held-out rows: loss and perplexity, or loss and accuracy."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from lorakin.errors import DataError
from lorakin.family.settings import require
from lorakin.inject.module_mode import in_mode
from lorakin.training.answers import ANSWERS, LOSS_ON
from lorakin.training.batches import AnswerCollator, Row, answer_loss
from lorakin.training.chat_templates import use_template
from lorakin.training.encoding import encode, encode_labelled
from lorakin.training.generation_settings import nan_error
from lorakin.training.limits import check_rows, position_count, row_length, warn_cut
from lorakin.training.models import Loaded, stored_labels
from lorakin.training.reading import DataRows, read_rows
from lorakin.training.token_labels import IGNORED
from lorakin.training.with_adapter import load_with_adapter


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out figures.

    Attributes:
        loss: the mean loss per answer token or, for a classifier, per row.
        count: over how many.
        accuracy: a classifier's share of right answers; None for a language model.
    """

    loss: float
    count: int
    accuracy: float | None = None

    @property
    def perplexity(self) -> float | None:
        """exp(loss) for a language model, None for a classifier."""
        return None if self.accuracy is not None else math.exp(min(self.loss, 700))

    def as_dict(self) -> dict[str, float]:
        """Returns the figures by name, without those that do not apply."""
        named = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "count": self.count,
        }
        return {name: value for name, value in named.items() if value is not None}


def described(evaluation: Evaluation) -> str:
    """Returns an evaluation in words.

    >>> described(Evaluation(loss=0.5, count=1200))
    'loss 0.500, perplexity 1.65 over 1,200 answer tokens'
    """
    loss, count = f"loss {evaluation.loss:.3f}", f"{evaluation.count:,}"
    if evaluation.accuracy is not None:
        return f"accuracy {evaluation.accuracy:.1%}, {loss} over {count} rows"
    return f"{loss}, perplexity {evaluation.perplexity:.2f} over {count} answer tokens"


def answer_collator(model: Any, tokenizer: Any) -> AnswerCollator:
    """Returns the collator for a language model.

    It asks for logits at the answers alone, if the model's forward can do that.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return AnswerCollator(pad, "logits_to_keep" in inspect.signature(model.forward).parameters)


@torch.no_grad()
def evaluate(
    model: Any, collate: Callable[..., Any], examples: Sequence[Row], batch_size: int
) -> Evaluation:
    """Evaluates a model on tokenised rows.

    The longest rows come first: batches hold little padding then, and a model that is too large for
    the memory fails at once.

    Args:
        model: a transformers model, on its device.
        collate: makes a batch of rows.
        examples: the rows.
        batch_size: rows at a time.
    """
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]), reverse=True)
    total, count, right = 0.0, 0, None
    with in_mode(model, training=False):
        for batch in DataLoader(ordered, batch_size=batch_size, collate_fn=collate):  # type: ignore[arg-type]
            batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
            labels = batch.pop("labels")
            outputs = model(**batch)
            if labels.ndim == 1:
                logits = outputs.logits.float()
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                right = (right or 0) + int((logits.argmax(-1) == labels).sum())
                count += len(labels)
            else:
                total += float(answer_loss(outputs, labels, num_items_in_batch=1))
                count += int((labels[:, 1:] != IGNORED).sum())
    return Evaluation(total / count, count, None if right is None else right / count)


def evaluate_rows(
    model: str,
    adapter: str | None,
    name: str | Sequence[str],
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    loss_on: str = ANSWERS,
    chat_template: bool | str = True,
    columns: Mapping[str, str] | None = None,
    layout: str | None = None,
    dtype: str = "auto",
    other_base: bool = False,
    quantize: str | None = None,
) -> Evaluation:
    """Evaluates a model, with an adapter or without, on all rows of a data set.

    Args:
        model: a base model, as for `load_model`.
        adapter: a directory or hub id; None for the base alone.
        name: files or hub data sets.
        batch_size: rows at a time.
        max_length: tokens at which rows are cut.
        loss_on: "answers", "last" or "all".
        chat_template: as for `use_template`.
        columns, layout: as for `read_rows`.
        dtype, quantize: as for `load_model`.
        other_base: as for `load_with_adapter`.

    Raises:
        ModelError: the model computes NaN or infinity.
        LorakinError: the data, the model or the adapter cannot be used.
    """
    require(loss_on in LOSS_ON, f"loss_on must be {', '.join(LOSS_ON)}, not {loss_on!r}")
    rows = read_rows(name, columns, layout)
    loaded = _loaded_for(rows, model, adapter, dtype, other_base, quantize)
    tokenizer = loaded.tokenizer
    length = row_length(position_count(loaded.model), max_length)
    if rows.is_classification:
        names = loaded.model.config.id2label
        encoded = encode_labelled(rows, tokenizer, length, [names[n] for n in sorted(names)])
        collate: Any = transformers.DataCollatorWithPadding(tokenizer)
    else:
        use_template(tokenizer, chat_template, rows)
        encoded = encode(rows, tokenizer, length, loss_on)
        collate = answer_collator(loaded.model, tokenizer)
    check_rows(encoded.examples, loaded, encoded.where, rows.name)
    warn_cut(length, max_length, model, encoded.examples)
    figures = evaluate(loaded.model, collate, encoded.examples, batch_size)
    if not math.isfinite(figures.loss):
        raise nan_error(loaded.name)
    return figures


def _loaded_for(
    rows: DataRows,
    model: str,
    adapter: str | None,
    dtype: str,
    other_base: bool,
    quantize: str | None,
) -> Loaded:
    """Loads the model, a classifier if the rows have classes.

    Raises:
        DataError: the rows do not suit the model.
    """
    labels = stored_labels(model) if rows.is_classification and adapter is None else None
    if rows.is_classification and adapter is None and labels is None:
        raise DataError(
            f"{rows.name} has labels, but without --adapter the classifier would have a random head"
        )
    loaded = load_with_adapter(model, adapter, dtype, labels, other_base, quantize)
    kind = type(loaded.model).__name__
    if kind.endswith("ForSequenceClassification") != rows.is_classification:
        raise DataError(f"{rows.name} has format {rows.formats[0]}, which does not suit a {kind}")
    return loaded
