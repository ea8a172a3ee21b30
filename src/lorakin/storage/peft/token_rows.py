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
from lorakin.inject.trainable_tokens import TokenRows, base_table, check_free, tied_rows
from lorakin.storage.peft.forms import PREFIX, TOKENS

FIELD = "trainable_token_indices"
"""The field of an adapter that has pairs too."""
IDS = "token_indices"
"""The field of an adapter that is rows alone."""
DELTA, WRAPPER = ".trainable_tokens_delta", ".token_adapter"
OTHER_BASE = 0.25
"""If more of a table's rows differ than this share, it is that of another base."""


def to_files(
    model: nn.Module, tokens: Mapping[str, TokenRows], values: Mapping[str, Tensor], alone: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config fields, and tensors by key without PEFT's prefix, of these rows.

    Args:
        model: the base. Where its config says that embeddings are tied, PEFT ties the rows itself.
        tokens: path → ids.
        values: path → rows (k, dim).
        alone: write PEFT's type of an adapter that has nothing else; one list of ids for all.
    """
    if not tokens:
        return {}, {}
    ids, tensors = {}, {}
    for path, rows in tokens.items():
        for place in (path,) if _peft_ties(model, path) else (path, *rows.tied):
            ids[place] = list(rows.ids)
            tensors[place] = values[path]
    wrapper = "" if alone else WRAPPER
    keyed = {f"{path}{wrapper}{DELTA}": tensor for path, tensor in tensors.items()}
    if alone:
        return {IDS: next(iter(ids.values())), "target_modules": sorted(ids)}, keyed
    only = len(ids) == 1 and _is_input(model, next(iter(ids)))
    return {FIELD: next(iter(ids.values())) if only else ids}, keyed


def _is_input(model: nn.Module, path: str) -> bool:
    try:
        table = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return False
    return table is not None and model.get_submodule(path) is table


def _peft_ties(model: nn.Module, path: str) -> bool:
    """Whether PEFT has the rows of the embedding at `path` count in what is tied to it."""
    return _is_input(model, path) and bool(
        getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    )


def stand_alone(tokens: Mapping[str, TokenRows]) -> bool:
    """Whether PEFT's type for rows alone can hold these: the ids are the same everywhere."""
    return len({rows.ids for rows in tokens.values()}) == 1


def says_all_of_ties(config: Mapping[str, Any]) -> bool:
    """Whether `ensure_weight_tying` asks only that tied tables share their rows, as they do."""
    return bool(_field(config)) and not config.get("modules_to_save")


def counts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Path → how many rows an adapter's file holds."""
    found = {
        key.removeprefix(PREFIX): len(rows) for key, rows in tensors.items() if key.endswith(DELTA)
    }
    return {key.removesuffix(DELTA).removesuffix(WRAPPER): count for key, count in found.items()}


@dataclasses.dataclass(frozen=True)
class Taken:
    """Rows read from files and matched with a model, and the tensors of the file that are none."""

    tokens: Mapping[str, TokenRows]
    values: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]


def taken(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    slots: Collection[str],
    copies: Collection[str],
    vocabulary: Mapping[str, str],
    where: str,
) -> Taken:
    """Matches token rows, and tables of the base that PEFT has added, with `model`.

    PEFT adds its base's embedding and head when the vocabulary was resized. The rows there that
    this base does not have become the adapter's: a resize fills new rows at random.

    Args:
        model: the base.
        modules: its modules by path.
        config: PEFT's.
        tensors: by key without PEFT's prefix.
        slots: paths of modules that have pairs; they cannot have token rows.
        copies: paths of modules that are trained whole; they cannot have token rows either.
        vocabulary: parameter's name → its sample in the base's fingerprint, where one is known.
        where: for errors.

    Raises:
        AdapterError: rows that do not fit the config or the model, or a table of another base.
    """
    rows, tables, rest = _sorted(modules, tensors)
    if not rows and not tables and not _field(config):
        return Taken({}, {}, rest)
    ids = _ids(modules, config, rows, where)
    values: dict[str, dict[int, Tensor]] = {}
    for path, own in ids.items():
        size = len(tables[path]) if path in tables else _size(vocabulary, path)
        _check_rows(path, modules[path], own, rows[path], size, where)
        values[path] = dict(zip(own, rows[path], strict=True))
    for path, table in tables.items():
        new = _new_rows(path, modules[path], table, values.get(path, {}), where)
        if new and (path in slots or path in copies):
            raise _another(path, table, modules[path], where)
        values.setdefault(path, {}).update(new)
    try:
        named = {path: tuple(sorted(own)) for path, own in values.items() if own}
        tokens = tied_rows(
            model,
            named,
            copies,
            lambda one, other: (
                _same(values[one], values[other]) if other in named else _peft_ties(model, one)
            ),
        )
        check_free(tokens, slots)
    except (SettingError, TargetError) as error:
        raise AdapterError(f"{where}: {error}") from None
    return Taken(
        tokens,
        {path: torch.stack([values[path][n] for n in tokens[path].ids]) for path in tokens},
        rest,
    )


def _field(config: Mapping[str, Any]) -> Any:
    return config.get(IDS if config.get("peft_type") == TOKENS.peft_type else FIELD)


def _sorted(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Rows by path, tables by path, and the rest."""
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
    """Path → ids in the order of the file's rows."""
    field = _field(config)
    if unknown := sorted(set(rows) - set(modules)):
        raise AdapterError(
            f"{where}: it is for another base model: it trains rows of {some(unknown)}, which this "
            "model does not have"
        )
    named = field if isinstance(field, Mapping) else {"": field} if field else {}
    found: dict[str, list[int]] = {}
    for path in rows:  # PEFT takes every module whose path ends in the name
        fitting = [name for name in named if path.endswith(name)]
        if fitting:
            found[path] = list(named[max(fitting, key=len)])
    # A head that is tied to one of them may have rows without being named.
    for path in rows.keys() - found.keys():
        weight = modules[path]._parameters.get("weight")
        leader = next(
            (one for one in found if modules[one]._parameters.get("weight") is weight), None
        )
        if leader is None:
            raise AdapterError(f"{where}: it has rows of {path}, which {FIELD} does not name")
        found[path] = found[leader]
    for name in named:
        ended = [path for path in modules if path and path.endswith(name)] if name else list(rows)
        weights = [modules[path]._parameters.get("weight") for path in found]
        if not any(
            path in found or _is_one_of(modules[path]._parameters.get("weight"), weights)
            for path in ended
        ):
            raise AdapterError(
                f"{where}: {FIELD} names tokens{f' of {name}' * bool(name)}, but the file has no "
                "rows of them"
            )
    return found


def _is_one_of(weight: Tensor | None, weights: Iterable[Tensor | None]) -> bool:
    return weight is not None and any(weight is other for other in weights)


def _size(vocabulary: Mapping[str, str], path: str) -> int:
    """How many rows the table had where the adapter was trained, 0 if that is not known."""
    known = vocabulary.get(f"{path}.weight", "").split()
    return int(known[1].split("x")[0]) if len(known) > 1 else 0


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
            f"{where}: the trained rows of {path} are no finite floating numbers ({rows.dtype})"
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
    """The rows of a table that differ from this base's, without those that are trained anyway."""
    here = base_table(module)
    if table.shape != here.shape:
        raise _another(path, table, module, where)
    if here.is_meta:
        return {}
    close = torch.isclose(table.float(), here.cpu().float(), rtol=1e-2, atol=1e-3).all(1)
    differ = [row for row in (~close).nonzero()[:, 0].tolist() if row not in trained]
    if len(differ) > max(1, math.floor(OTHER_BASE * len(table))):
        raise _another(path, table, module, where)
    return {row: table[row].clone() for row in differ}


def _another(path: str, table: Tensor, module: nn.Module, where: str) -> AdapterError:
    here: Any = module._parameters["weight"]
    resized = table.dim() == 2 and table.shape[1:] == here.shape[1:] and len(table) != len(here)
    advice = (
        "if its vocabulary was resized, resize this one first: "
        f"model.resize_token_embeddings({len(table)})"
        if resized
        else "load that weight first"
    )
    return AdapterError(
        f"{where}: it is for another base model: {path} had another weight there, "
        f"{tuple(table.shape)}, perhaps because its vocabulary was resized or trained; this "
        f"model's is {tuple(here.shape)}; {advice}"
    )


def _same(one: Mapping[int, Tensor], two: Mapping[int, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
