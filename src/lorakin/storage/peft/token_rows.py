"""Token rows in PEFT's files, and the tables that PEFT adds if a vocabulary was resized.

PEFT calls them `trainable_token_indices`. Its `trainable_tokens_delta` (k, dim) holds the rows
themselves, not differences, in the order of the config's ids.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError, SettingError, TargetError, some
from lorakin.family import all_finite
from lorakin.inject.trainable_tokens import TokenRows, base_table, check_no_pair_on_rows, tied_rows
from lorakin.storage.peft.formats import PREFIX, TOKENS_ONLY

FIELD = "trainable_token_indices"
"""The field of an adapter that has pairs too."""
IDS = "token_indices"
"""The field of an adapter that is rows alone."""
DELTA, WRAPPER = ".trainable_tokens_delta", ".token_adapter"
MOST_NEW_ROWS = 0.25
"""The largest share of rows by which a table may differ; above, it is that of another base."""


def to_peft(
    model: nn.Module, tokens: Mapping[str, TokenRows], values: Mapping[str, Tensor], alone: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the config fields of these rows, and their tensors by key without PEFT's prefix.

    Args:
        model: the base. Where its config says that embeddings are tied, PEFT ties the rows itself.
        tokens: path → ids.
        values: path → rows (k, dim).
        alone: whether to write PEFT's type for token rows alone, with one list of ids for all.
    """
    if not tokens:
        return {}, {}
    ids, tensors = {}, {}
    for path, rows in tokens.items():
        for table in (path,) if _peft_ties(model, path) else (path, *rows.tied):
            ids[table] = list(rows.ids)
            tensors[table] = values[path]
    wrapper = "" if alone else WRAPPER
    keyed = {f"{path}{wrapper}{DELTA}": tensor for path, tensor in tensors.items()}
    if alone:
        return {IDS: next(iter(ids.values())), "target_modules": sorted(ids)}, keyed
    # PEFT takes a list without a path for the input embedding.
    is_input_alone = len(ids) == 1 and _is_input(model, next(iter(ids)))
    return {FIELD: next(iter(ids.values())) if is_input_alone else ids}, keyed


def _is_input(model: nn.Module, path: str) -> bool:
    try:
        table = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return False
    return table is not None and model.get_submodule(path) is table


def _peft_ties(model: nn.Module, path: str) -> bool:
    """Returns whether PEFT itself applies the rows of the embedding at `path` to the tied head."""
    return _is_input(model, path) and bool(
        getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    )


def stand_alone(tokens: Mapping[str, TokenRows]) -> bool:
    """Returns whether PEFT's type for token rows alone can hold these: all have the same ids."""
    return len({rows.ids for rows in tokens.values()}) == 1


def says_all_of_ties(config: Mapping[str, Any]) -> bool:
    """Returns whether `ensure_weight_tying` asks only for tied tables to share rows, as they do."""
    return bool(_field(config)) and not config.get("modules_to_save")


def counts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns path → number of rows in an adapter's file."""
    return {
        key.removeprefix(PREFIX).removesuffix(DELTA).removesuffix(WRAPPER): len(rows)
        for key, rows in tensors.items()
        if key.endswith(DELTA)
    }


@dataclasses.dataclass(frozen=True)
class ReadTokenRows:
    """Token rows read from files and matched with a model, and the file's other tensors."""

    tokens: Mapping[str, TokenRows]
    values: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]


def from_peft(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    slots: Collection[str],
    whole_modules: Collection[str],
    samples: Mapping[str, str],
    where: str,
) -> ReadTokenRows:
    """Reads token rows, and tables of the base that PEFT added to the file.

    PEFT adds its base's embedding and head if the vocabulary was resized. Rows of them that this
    base does not have become the adapter's, since a resize fills new rows at random.

    Args:
        model: the base.
        modules: its modules by path.
        config: PEFT's.
        tensors: by key without PEFT's prefix.
        slots: paths of modules that have pairs; they cannot have token rows.
        whole_modules: paths of modules that are trained whole; they cannot have token rows either.
        samples: parameter's name → its sample in the base's fingerprint, if there is one.
        where: the file, for messages.

    Raises:
        AdapterError: rows that do not fit the config or the model, or a table of another base.
    """
    rows, tables, rest = _by_kind(modules, tensors)
    if not rows and not tables and not _field(config):
        return ReadTokenRows({}, {}, rest)
    ids = _ids(modules, config, rows, where)
    values: dict[str, dict[int, Tensor]] = {}
    for path, ids_of_path in ids.items():
        size = len(tables[path]) if path in tables else _size(samples, path)
        _check_rows(path, modules[path], ids_of_path, rows[path], size, where)
        values[path] = dict(zip(ids_of_path, rows[path], strict=True))
    for path, table in tables.items():
        new = _new_rows(path, modules[path], table, values.get(path, {}), where)
        if new and (path in slots or path in whole_modules):
            raise _other_table_error(path, table, modules[path], where)
        values.setdefault(path, {}).update(new)
    try:
        ids_by_path = {path: tuple(sorted(rows)) for path, rows in values.items() if rows}

        def same_values(path: str, other: str) -> bool:
            if other in ids_by_path:
                return _equal_rows(values[path], values[other])
            return _peft_ties(model, path)

        tokens = tied_rows(model, ids_by_path, whole_modules, same_values)
        check_no_pair_on_rows(tokens, slots)
    except (SettingError, TargetError) as error:
        raise AdapterError(f"{where}: {error}") from None
    return ReadTokenRows(
        tokens,
        {path: torch.stack([values[path][n] for n in tokens[path].ids]) for path in tokens},
        rest,
    )


def _field(config: Mapping[str, Any]) -> Any:
    return config.get(IDS if config.get("peft_type") == TOKENS_ONLY.peft_type else FIELD)


def _by_kind(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Returns rows by path, tables by path, and the other tensors by key."""
    rows, tables, rest = {}, {}, {}
    for key, tensor in tensors.items():
        table = key.removesuffix(".weight").removesuffix(".base_layer").removesuffix(WRAPPER)
        if key.endswith(DELTA):
            rows[key.removesuffix(DELTA).removesuffix(WRAPPER)] = tensor
        elif key.endswith(".weight") and _holds_a_table(modules.get(table)):
            tables[table] = tensor
        else:
            rest[key] = tensor
    return rows, tables, rest


def _holds_a_table(module: nn.Module | None) -> bool:
    return (
        isinstance(module, nn.Embedding | nn.Linear)
        and module._parameters.get("weight") is not None
    )


def _ids(
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    rows: Mapping[str, Tensor],
    where: str,
) -> dict[str, list[int]]:
    """Returns path → ids in the order of the file's rows."""
    field = _field(config)
    if unknown := sorted(set(rows) - set(modules)):
        raise AdapterError(
            f"{where}: it is for another base model: it trains rows of {some(unknown)}, which this "
            "model does not have"
        )
    ids_by_name = field if isinstance(field, Mapping) else {"": field} if field else {}
    ids = {
        path: list(ids_by_name[name])
        for path in rows
        if (name := _name_of(path, ids_by_name)) is not None
    }

    # A head that is tied to one of them may have rows without being ids_by_name.
    for path in rows.keys() - ids.keys():
        tied = next(
            (other for other in ids if _weight(modules, other) is _weight(modules, path)), None
        )
        if tied is None:
            raise AdapterError(f"{where}: it has rows of {path}, which {FIELD} does not name")
        ids[path] = ids[tied]

    weights = [_weight(modules, path) for path in ids]
    for name in ids_by_name:
        tables = [path for path in modules if path and path.endswith(name)] if name else list(rows)
        if not any(path in ids or _is_one_of(_weight(modules, path), weights) for path in tables):
            raise AdapterError(
                f"{where}: {FIELD} names tokens{f' of {name}' * bool(name)}, but the file has no "
                "rows of them"
            )
    return ids


def _name_of(path: str, names: Iterable[str]) -> str | None:
    """Returns the longest name that `path` ends in, as PEFT chooses modules; None without one."""
    return max((name for name in names if path.endswith(name)), key=len, default=None)


def _weight(modules: Mapping[str, nn.Module], path: str) -> Tensor | None:
    return modules[path]._parameters.get("weight")


def _is_one_of(weight: Tensor | None, weights: Iterable[Tensor | None]) -> bool:
    return weight is not None and any(weight is other for other in weights)


def _size(samples: Mapping[str, str], path: str) -> int:
    """Returns the number of rows of the table in training; 0 if that is not known."""
    sample = samples.get(f"{path}.weight", "").split()
    return int(sample[1].split("x")[0]) if len(sample) > 1 else 0


def _check_rows(
    path: str, module: nn.Module, ids: list[int], rows: Tensor, size: int, where: str
) -> None:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        raise AdapterError(
            f"{where}: it trains rows of {path}, but that is a {type(module).__name__} here"
        )
    if rows.shape != (len(ids), weight.shape[1]):
        raise AdapterError(
            f"{where}: {path} has trained rows of shape {tuple(rows.shape)}, expected "
            f"{(len(ids), weight.shape[1])}: one of width {weight.shape[1]} for each of its tokens"
        )
    if not rows.is_floating_point() or rows.element_size() < 2 or not all_finite(rows):
        raise AdapterError(
            f"{where}: the trained rows of {path} are not finite floating numbers ({rows.dtype})"
        )
    if max(ids, default=0) >= len(weight):
        size = max(size, max(ids) + 1)
        raise AdapterError(
            f"{where}: it trains token {max(ids)} of {path}, which has {len(weight)} rows here: "
            "its base was resized before training. Resize this one first: "
            f"model.resize_token_embeddings({size}); what that puts into the trained rows does not "
            "matter"
        )


def _new_rows(
    path: str, module: nn.Module, table: Tensor, trained: Mapping[int, Tensor], where: str
) -> dict[int, Tensor]:
    """Returns the rows of a table that differ from this base's, without the trained ones."""
    base = base_table(module)
    if table.shape != base.shape:
        raise _other_table_error(path, table, module, where)
    if base.is_meta:
        return {}
    close = torch.isclose(table.float(), base.cpu().float(), rtol=1e-2, atol=1e-3).all(1)
    differ = [row for row in (~close).nonzero()[:, 0].tolist() if row not in trained]
    if len(differ) > max(1, math.floor(MOST_NEW_ROWS * len(table))):
        raise _other_table_error(path, table, module, where)
    return {row: table[row].clone() for row in differ}


def _other_table_error(path: str, table: Tensor, module: nn.Module, where: str) -> AdapterError:
    base: Any = module._parameters["weight"]
    is_table = table.dim() == 2 and table.shape[1:] == base.shape[1:]
    advice = "load that weight first"
    if is_table and len(table) != len(base):
        advice = (
            "if its vocabulary was resized, resize this one first: "
            f"model.resize_token_embeddings({len(table)})"
        )
    return AdapterError(
        f"{where}: it is for another base model: {path} had another weight there, "
        f"{tuple(table.shape)}, perhaps because its vocabulary was resized or trained; this "
        f"model's is {tuple(base.shape)}; {advice}"
    )


def _equal_rows(first: Mapping[int, Tensor], second: Mapping[int, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
