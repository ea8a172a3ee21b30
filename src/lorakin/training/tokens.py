"""The rows of embedding and head that are trained for some tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorakin.errors import SettingError


def rows_of(
    words: Sequence[str], tokenizer: Any, model: nn.Module
) -> list[int] | Mapping[str, list[int]]:
    """Returns these tokens' rows for `lorakin.adapt`, in the embedding and in a head of its own.

    A new token is to be read and to be written, so both count if they are not tied.

    Args:
        words: ids, such as "100", or tokens as the tokenizer has them, such as "<|im_start|>".
        tokenizer: finds the ids.
        model: a transformers model.

    Raises:
        SettingError: a token that the tokenizer does not have.
    """
    ids = [int(word) if word.isdecimal() else _id_of(word, tokenizer) for word in words]
    tables = [
        getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")
    ]
    weights = [getattr(table, "weight", None) for table in tables]
    if not ids or weights[1] is None or weights[0] is weights[1]:
        return ids
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(table)]: ids for table in tables}


def _id_of(word: str, tokenizer: Any) -> int:
    number = tokenizer.convert_tokens_to_ids(word)
    if not isinstance(number, int) or (
        number == tokenizer.unk_token_id and word != tokenizer.unk_token
    ):
        raise SettingError(
            f"trainable_tokens: the model's tokenizer has no token {word!r}; add it with "
            f"tokenizer.add_tokens([{word!r}]) and "
            "model.resize_token_embeddings(len(tokenizer)), save both to a directory, and train "
            "that model"
        )
    return number
