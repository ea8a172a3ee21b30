"""What a model can read: how many tokens in a row, and which token ids."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import transformers
from torch import nn

from lorakin.errors import DataError, LorakinWarning, ModelError
from lorakin.training.base_class import BaseClass
from lorakin.training.batches import texts_of

POSITION_TABLES = re.compile(
    r"wpe|(.*_)?pos(itions?)?(_emb.*|_enc.*)?|position_embeds_layer|embed_positions"
)
"""Names of modules and tensors that hold a vector for each position."""
NOT_TEXT = re.compile(r"(^|[._])(vision|visual|image|audio|speech|rel|relative|box|patch)")
"""In the path of one whose positions are not those of a text's tokens."""


def position_count(model: nn.Module) -> int | None:
    """Returns how many tokens a row may have: the rows of the model's table of positions.

    None if it has no such table. Learned and absolute positions have one (BERT, GPT-2, OPT, GPT-J);
    rotary and relative ones do not. Some tables begin late: OPT's at row 2, RoBERTa's after the row
    of the padding token. Only names and shapes are read, so the model may be on the meta device.
    """
    counts: list[int] = []
    config: Any = getattr(model, "config", None)
    for path, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if _is_table(path) and getattr(weight, "ndim", 0) == 2:
            counts.append(
                getattr(module, "num_embeddings", weight.shape[0]) - _first_position(module)
            )
    for path, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if _is_table(path) and tensor.ndim == 2 and tensor.shape[0] > 1:
            counts.append(tensor.shape[0])
    if counts:
        counts.append(getattr(config, "max_position_embeddings", None) or counts[0])
    # MPT makes its biases once, for so many positions and no more.
    if getattr(getattr(config, "attn_config", None), "alibi", False):
        counts.append(config.max_seq_len)
    return min(counts, default=None)


def position_count_of_config(config: Any) -> int | None:
    """Returns the `position_count` of a model with this config, whatever its head."""
    try:
        return position_count(BaseClass(transformers.AutoModel).skeleton(config))
    except ModelError:
        return None


def row_length(positions: int | None, wanted: int) -> int:
    """Returns at how many tokens rows are cut: `wanted`, or the model's `positions` if fewer.

    More is not refused: `wanted` is often a default, or another model's, and only one value works.

    >>> row_length(512, 1024)
    512
    """
    return wanted if positions is None else min(wanted, positions)


def warn_cut(length: int, wanted: int, name: str, *examples: Iterable[Mapping[str, Any]]) -> None:
    """Warns if rows were cut because the model has no more positions.

    Args:
        length: tokens at which rows were cut.
        wanted: tokens that the user asked for.
        name: the model.
        examples: the rows, in one or several parts.
    """
    if length < wanted and any(
        len(text["input_ids"]) >= length
        for rows in examples
        for example in rows
        for text in texts_of(example)
    ):
        warnings.warn(
            f"rows are cut at {length} tokens instead of {wanted} (--max-length): {name} has no "
            "more positions",
            LorakinWarning,
            stacklevel=2,
        )


def check_rows(
    examples: Sequence[Mapping[str, Any]], loaded: Any, where: Sequence[str], source: str
) -> None:
    """Checks that the model can read rows; warns if they are longer than those it was trained on.

    Args:
        examples: with `input_ids`.
        loaded: the model and its tokenizer (`models.Loaded`).
        where: each example's row in the data, for messages.
        source: what the rows are called.

    Raises:
        DataError: an id for which the embedding has no row.
    """
    check_ids(examples, loaded, where)
    texts = [text for example in examples for text in texts_of(example)]
    made_for = getattr(loaded.model.config, "max_position_embeddings", None)
    longest = max((len(text["input_ids"]) for text in texts), default=0)
    if isinstance(made_for, int) and longest > made_for and position_count(loaded.model) is None:
        warnings.warn(
            f"{source}: the longest row has {longest} tokens, and {loaded.name} was made for "
            f"{made_for}: it can read on, but was not trained to; --max-length cuts rows",
            LorakinWarning,
            stacklevel=2,
        )


def check_ids(examples: Sequence[Mapping[str, Any]], loaded: Any, where: Sequence[str]) -> None:
    """Checks that the embedding has a row for each token; the arguments are `check_rows`'s.

    Raises:
        DataError: it has not.
    """
    rows = _embedding_rows(loaded.model)
    for example, row in zip(examples, where, strict=True):
        over = max((max(text["input_ids"], default=0) for text in texts_of(example)), default=0)
        if rows is not None and over >= rows:
            _refuse(over, rows, loaded, row)


def check_prompt(ids: Iterable[int], loaded: Any) -> None:
    """Checks that the embedding has a row for each token of a prompt.

    Raises:
        DataError: it has not.
    """
    check_rows([{"input_ids": list(ids)}], loaded, ["the prompt"], "the prompt")


def _refuse(over: int, rows: int, loaded: Any, where: str) -> None:
    text = loaded.tokenizer.convert_ids_to_tokens(over)
    raise DataError(
        f"{where}: the token {text!r} has the id {over}, but the embedding of {loaded.name} has "
        f"{rows} rows, 0 to {rows - 1}; its tokenizer knows {len(loaded.tokenizer)} tokens. "
        f"Give it rows with model.resize_token_embeddings({len(loaded.tokenizer)}), save model "
        f"and tokenizer to a directory, and take that as --model, with --trainable-tokens '{text}' "
        "so that the new row learns; or take the tokenizer that the model was made with"
    )


def _embedding_rows(model: Any) -> int | None:
    """Returns how many rows the input embedding has; None if it cannot be found."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(table, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def _is_table(path: str) -> bool:
    return (
        POSITION_TABLES.fullmatch(path.rpartition(".")[2]) is not None
        and NOT_TEXT.search(path) is None
    )


def _first_position(table: Any) -> int:
    """Returns the row of the first position."""
    if (padding := getattr(table, "padding_idx", None)) is not None:
        return int(padding) + 1
    return int(getattr(table, "offset", 0))
