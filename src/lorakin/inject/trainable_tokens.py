"""`trainable_tokens`: which rows of which tables an adapter trains, checked on the model.

`token_rows.py` has the module that holds the rows (PEFT: `trainable_token_indices`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import SettingError, StateError, TargetError, some
from lorakin.family.precision import wide_dtype
from lorakin.family.sharding import is_distributed, whole_shape
from lorakin.inject import layer_kinds
from lorakin.inject.attachments import Attachments, attachments_or_none
from lorakin.inject.layer_kinds import EmbeddingLayer, LinearLayer, QuantisedLayer
from lorakin.inject.patterns import is_inside
from lorakin.inject.targets import named_modules
from lorakin.inject.token_rows import TokenRowsBranch

Tokens = Iterable[int] | Mapping[str, Iterable[int]]
RESIZE = (
    "a new token needs its row first: tokenizer.add_tokens([…]), and then "
    "model.resize_token_embeddings(len(tokenizer))"
)


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """The ids of the rows that are trained in one module, ascending.

    `tied` has the paths of modules that hold the same weight, and so see the same rows.
    """

    ids: tuple[int, ...]
    tied: tuple[str, ...] = ()


def find_tokens(
    model: nn.Module, tokens: Tokens | None, whole_modules: Iterable[str] = ()
) -> dict[str, TokenRows]:
    """Returns the rows to train by the path of the module, each weight once.

    The rows of an embedding count in every module that holds the same weight, such as a tied head,
    unless that module is given other rows or is trained whole. This is PEFT's rule.

    Args:
        model: the base.
        tokens: ids for the input embedding, or ids by the name of a module: its path, or last
            parts.
        whole_modules: paths of modules that are trained whole; no rows can be trained in them.

    Raises:
        SettingError: something is not the id of a row that the module has.
        TargetError: there is no such module, or no rows of it can be trained.

    >>> model = nn.Sequential(nn.Embedding(8, 2))
    >>> find_tokens(model, [5, 3])
    {'0': TokenRows(ids=(3, 5), tied=())}
    """
    modules = named_modules(model)
    return tied_rows(model, _ids_by_path(model, modules, tokens), whole_modules)


def tied_rows(
    model: nn.Module,
    ids_by_path: Mapping[str, tuple[int, ...]],
    whole_modules: Iterable[str] = (),
    same_values: Callable[[str, str], bool] = lambda path, other: True,
) -> dict[str, TokenRows]:
    """Returns the same as `find_tokens`, from ids by path.

    `same_values(path, other)` says whether a module with the weight of `path` sees its rows.
    """
    modules, whole_modules = named_modules(model), tuple(whole_modules)
    rows: dict[str, TokenRows] = {}
    partners: set[str] = set()
    for path, ids in sorted(ids_by_path.items(), key=lambda item: list(modules).index(item[0])):
        _check(path, modules[path], ids)
        if around := [whole for whole in whole_modules if is_inside(path, [whole])]:
            raise TargetError(
                f"rows of {path} are to be trained, but {around[0]} is changed otherwise too, for "
                "example by modules_to_save; leave out one"
            )
        if path in partners:
            continue
        tied = [
            other
            for other in _partners(modules, path)
            if not is_inside(other, whole_modules)
            and ids_by_path.get(other, ids) == ids
            and same_values(path, other)
        ]
        partners |= set(tied)
        rows[path] = TokenRows(ids, tuple(tied))
    return rows


def check_no_pair_on_rows(tokens: Mapping[str, TokenRows], adapted_paths: Iterable[str]) -> None:
    """Checks that no module with trained rows is among `adapted_paths`, which get a pair.

    Raises:
        TargetError: one is.
    """
    if both := sorted(set(adapted_paths) & set(paths_with_rows(tokens))):
        raise TargetError(
            f"{both[0]} cannot have both: an adapter's pair, and rows of tokens that are trained. "
            "Leave it out of the targets, or out of trainable_tokens (a head tied to the embedding "
            "has its rows)"
        )


def _ids_by_path(
    model: nn.Module, modules: Mapping[str, nn.Module], tokens: Tokens | None
) -> dict[str, tuple[int, ...]]:
    """Returns the ids that the user named, by path."""
    if isinstance(tokens, str):
        raise SettingError(
            f"trainable_tokens holds ids of tokens, not {tokens!r}; "
            "tokenizer.convert_tokens_to_ids([…]) gives them"
        )
    if not isinstance(tokens, Mapping):
        try:
            ids = [] if tokens is None else list(tokens)
        except TypeError:
            raise SettingError(
                f"trainable_tokens is a list of ids, or module's name → ids, not {tokens!r}"
            ) from None
        if not ids:
            return {}
        return {_input_embedding(model, modules): _as_ids(ids, "the input embedding")}
    ids_by_path: dict[str, tuple[int, ...]] = {}
    for name, ids_of_name in tokens.items():
        paths = [path for path in modules if path and (path == name or path.endswith(f".{name}"))]
        if not paths:
            tables = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
            raise TargetError(
                f"trainable_tokens: {name!r} matches no module; embeddings there are: "
                f"{some(tables) or 'none'}"
            )
        for path in paths:
            ids_by_path[path] = _as_ids(ids_of_name, name)
    return ids_by_path


def _as_ids(tokens: Any, name: str) -> tuple[int, ...]:
    try:
        given = list(tokens)
        ids = [operator.index(token) for token in given if not isinstance(token, bool)]
        if len(ids) < len(given) or not ids:
            raise TypeError
    except TypeError:
        raise SettingError(
            f"trainable_tokens: expected the ids of some tokens for {name}, whole numbers, not "
            f"{str(tokens)[:80]}; tokenizer.convert_tokens_to_ids([…]) gives them"
        ) from None
    return tuple(sorted(set(ids)))


def _input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    try:
        table = getattr(model, "get_input_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):
        table = None
    for path, module in modules.items():
        if table is not None and module is table:
            return path
    tables = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
    if len(tables) != 1:
        raise TargetError(
            f"{type(model).__name__} does not say which is its input embedding; name it: "
            f"trainable_tokens={{'name': ids}}. Embeddings there are: {some(tables) or 'none'}"
        )
    return tables[0]


def _check(path: str, module: Any, ids: tuple[int, ...]) -> None:
    """Checks that rows of the module can be trained, and that it has these.

    Raises:
        TargetError: they cannot.
        SettingError: it has no such row.
    """
    if reason := layer_kinds.refusal(module) or _refusal_of_rows(module):
        raise TargetError(f"no rows of {path} can be trained: it is {reason}")
    count = whole_shape(module.weight)[0]
    if unknown := [token for token in ids if not 0 <= token < count]:
        raise SettingError(
            f"trainable_tokens: there is no token {unknown[0]} in {path}, which has {count} rows; "
            f"{RESIZE}"
        )


def _refusal_of_rows(module: Any) -> str | None:
    """Returns why no rows of a layer can be trained; None if they can."""
    kind = layer_kinds.kind_of(module)
    if kind is QuantisedLayer:
        return (
            "quantised; leave it out of that (bitsandbytes: llm_int8_skip_modules; torchao: "
            "modules_to_not_convert)"
        )
    if kind not in (EmbeddingLayer, LinearLayer):
        return f"a {type(module).__name__}; only embeddings and linear heads have rows to train"
    if hasattr(module.weight, "ds_id"):
        return "cut by DeepSpeed's ZeRO-3, so its rows cannot be read; load the model first"
    return None


def _partners(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Returns the other modules that hold the weight of an embedding."""
    weight = modules[path]._parameters["weight"]
    if not isinstance(modules[path], nn.Embedding):
        return []
    partners = []
    for other, module in modules.items():
        names = [name for name, parameter in module._parameters.items() if parameter is weight]
        if other == path or not names:
            continue
        is_table = layer_kinds.kind_of(module) in (EmbeddingLayer, LinearLayer)
        if names != ["weight"] or not is_table or layer_kinds.refusal(module):
            raise TargetError(
                f"{path} shares its weight with {other}, a {type(module).__name__}, in which rows "
                "cannot be trained"
            )
        partners.append(other)
    return partners


@torch.no_grad()
def base_rows(
    model: nn.Module, tokens: Mapping[str, TokenRows], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns the base's rows by path, in `dtype`, or float32 at least: a new adapter's start."""
    initial = {}
    for path, rows in tokens.items():
        table = base_table(model.get_submodule(path))
        wide = wide_dtype(table.dtype) if dtype is None else dtype
        initial[path] = table[torch.tensor(rows.ids, device=table.device)].to(wide)
    return initial


def base_table(module: Any) -> Tensor:
    """Returns the base's weight, unsharded, whatever adapters do with it."""
    attached = attachments_or_none(module) or Attachments()
    weight: Any = attached.base_before_merge.get("weight", module._parameters["weight"])
    table: Tensor = weight.full_tensor() if is_distributed(weight) else weight
    return table.detach()


def row_branches(
    modules: Mapping[str, nn.Module], tokens: Mapping[str, TokenRows], values: Mapping[str, Tensor]
) -> dict[str, TokenRowsBranch]:
    """Returns the branch to attach to each module; those with one weight share one parameter."""
    branches = {}
    for path, rows in tokens.items():
        device = modules[path]._parameters["weight"].device  # type: ignore[union-attr]
        parameter = nn.Parameter(values[path].detach().to(device), requires_grad=True)
        for tied_path in (path, *rows.tied):
            branches[tied_path] = TokenRowsBranch(tied_path, rows.ids, parameter)
    return branches


def paths_with_rows(tokens: Mapping[str, TokenRows]) -> tuple[str, ...]:
    """Returns the paths of all modules that see trained rows."""
    return tuple(ids_at(tokens))


def ids_at(tokens: Mapping[str, TokenRows]) -> dict[str, tuple[int, ...]]:
    """Returns the ids by the path of each module that sees trained rows."""
    return {p: rows.ids for path, rows in tokens.items() for p in (path, *rows.tied)}


def check_rows_distinct(tokens: Mapping[str, Mapping[str, TokenRows]]) -> None:
    """Checks that no two of these adapters, given by name, train the same row.

    Raises:
        SettingError: two do.
    """
    owner: dict[tuple[str, int], str] = {}
    for name, rows in tokens.items():
        for path, ids in ids_at(rows).items():
            for token in ids:
                if (other := owner.setdefault((path, token), name)) != name:
                    raise SettingError(
                        f"{other!r} and {name!r} both train token {token} of {path}; activate one "
                        "of them"
                    )


def keep_ties(
    model: nn.Module, tokens: Mapping[str, TokenRows], merged: Mapping[str, Sequence[str]]
) -> None:
    """Lets modules with one weight share the merged weight, if the same adapters are merged."""
    for path, rows in tokens.items():
        leader: Any = model.get_submodule(path)
        for other in rows.tied:
            if merged[path] and merged[path] == merged[other]:
                follower: Any = model.get_submodule(other)
                follower.weight = leader._parameters["weight"]


def table_with_rows(weight: Tensor, adapters: Sequence[TokenRowsBranch]) -> Tensor:
    """Returns `weight` (vocabulary, dim) with the rows of several adapters.

    Raises:
        StateError: two of them train the same row.
    """
    seen: set[int] = set()
    for rows in adapters:
        if twice := seen & set(rows.tokens):
            raise StateError(
                f"two adapters that both train token {min(twice)} of {rows.path} cannot both be "
                "merged; unmerge the other first"
            )
        seen |= set(rows.tokens)
        weight = rows.into(weight)
    return weight
