"""Plain LoRA from any adapter, and one adapter from several."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakin.adapter import Adapter, adapters, placed
from lorakin.errors import LorakinWarning, SettingError, StateError
from lorakin.family import Pair, all_finite
from lorakin.family.low_rank import Fit, nearest, padded, root_of_samples
from lorakin.family.settings import is_finite_number
from lorakin.storage import peft_format
from lorakin.storage.foreign import read_foreign
from lorakin.surgery.graft import root_of
from lorakin.surgery.hung import base_state
from lorakin.surgery.layers import LinearLayer, TransposedLayer
from lorakin.surgery.samples import input_samples
from lorakin.surgery.tokens import TokenRows, base_rows, ids_at, tied_rows

KERNEL = 8
"""Portable ranks are multiples of it, which suits the kernels that serve them."""
LARGEST = 512
"""The largest rank that vLLM serves."""


class Plain(NamedTuple):
    """A plain adapter, and by module path how near it comes to what it stands for."""

    adapter: Adapter
    fits: dict[str, Fit]


class Converted(NamedTuple):
    """An adapter from another library's file, that library's name, and what to know."""

    adapter: Adapter
    format: str
    notes: list[str]


@torch.no_grad()
def as_lora(
    adapter: Adapter,
    name: str = "plain",
    *,
    rank: int | None = None,
    error: float | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
    portable: bool = False,
) -> Plain:
    """Put a plain LoRA with the function of `adapter` beside it in the model, and make that the active one.

    It is exact for every method without a gain. With one (DoRA) the nearest plain LoRA is of limited rank: name the rank, or
    the error. Both can also make an exact one smaller.

    Args:
        adapter: any adapter that is in a model.
        name: of the new one.
        rank: the largest that a module gets.
        error: each module gets the smallest rank whose relative error is at most this: ‖ΔW − B·A‖ / ‖ΔW‖, or with
            `batches` the same of the module's outputs.
        batches: what the model takes as keywords; with them the outputs that linear modules give on this data count,
            not the weights alone.
        portable: one rank, a multiple of 8, for all modules, and scale 1: the form that vLLM and llama.cpp read.

    Raises:
        SettingError: a gain and neither rank nor error, or something that the portable form cannot hold.
        StateError: the adapter is merged, or has moved the base weights in place.
    """
    if adapter.is_merged:
        raise StateError(f"adapter {adapter.name!r} is merged; unmerge it before converting it")
    _check_limits(rank, error)
    if not all(isinstance(batch, Mapping) for batch in batches) or isinstance(batches, Mapping):
        raise SettingError(f"batches must be a list of mappings that the model takes as keywords, not {str(batches)[:80]}")
    seen = _Seen(input_samples(adapter, list(batches)) if batches else {})
    pairs, fits = {}, {}
    for path in adapter.plan.sites:
        change = adapter.change_at(path)
        if change.gain is not None and rank is None and error is None:
            raise SettingError(
                f"adapter {adapter.name!r} ({adapter.plan.method.words}) scales the base weight by a gain ({path}, …), which "
                "no plain LoRA does exactly. Name a rank or an error for the nearest one (rank=…, error=…; --rank, --error), "
                "or merge it into the model, which is exact"
            )
        _check_finite(change, adapter, path)
        weight = adapter.base_weight(path)
        pairs[path], fit = nearest(change, weight, rank=rank, error=error, root=seen.root(path))
        fits[path] = seen.judged(fit, change, pairs[path], weight, path)
    _warn_if_missed(fits, error)
    copies = {path: adapter.copy_of(path).state_dict() for path in adapter.plan.copies}
    rows = adapter.plan.tokens, {path: adapter.rows_at(path) for path in adapter.plan.tokens}
    if portable:
        pairs = _portable(adapter, pairs)
    return Plain(of_pairs(adapter.model, name, pairs, copies, rows), fits)


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str = "combined",
    *,
    rank: int | None = None,
    error: float | None = None,
) -> Plain:
    """Put one adapter in the model that changes each weight by Σ weight · change, over the adapters named, and make it active.

    Without rank or error it is exact: the pairs stand beside each other, and ranks add up. Modules trained whole, and trained
    rows of tokens, change by the weighted sum of their changes too.

    Args:
        model: holds the adapters.
        weights: adapter's name → weight; any number, 0 leaves it out.
        name: of the new adapter.
        rank, error: see `as_lora`; the sum's nearest pair of that rank, or within that error.

    Raises:
        SettingError: no adapter of that name; one with a gain (DoRA), whose change is no pair.
        StateError: an adapter is merged.
    """
    model = root_of(model)
    _check_limits(rank, error)
    if not isinstance(weights, Mapping) or not all(is_finite_number(weight) for weight in weights.values()):
        raise SettingError(f"expected an adapter's name → its weight, a finite number, for each adapter, not {weights!r}")
    if not any(weights.values()):
        raise SettingError(
            f"there is nothing to combine in {dict(weights)!r}: name at least one adapter with a weight other than 0"
        )
    known = adapters(model)
    if missing := [one for one in weights if one not in known]:
        raise SettingError(f"no adapter {missing[0]!r} in the model; there are: {', '.join(map(repr, known)) or 'none'}")
    parts: dict[str, list[Pair]] = {}
    for one, weight in weights.items():
        if known[one].is_merged:
            raise StateError(f"adapter {one!r} is merged; unmerge it before combining it")
        for path in known[one].plan.sites if weight else ():
            change = known[one].change_at(path)
            _check_finite(change, known[one], path)
            if change.gain is not None:
                raise SettingError(
                    f"adapter {one!r} ({known[one].plan.method.words}) scales the base weight by a gain, so its change cannot "
                    "be added to others; make a plain LoRA of it first: lorakin.as_lora, or lorakin export --to lora"
                )
            parts.setdefault(path, []).append(change._replace(up=weight * change.up))
    pairs, fits = {}, {}
    for path, changes in parts.items():
        whole = Pair(torch.cat([p.up for p in changes], 1), torch.cat([p.down for p in changes], 0))
        pairs[path], fits[path] = nearest(whole, whole.up, rank=rank, error=error)
    _warn_if_missed(fits, error)
    copies, rows = _combined_copies(model, known, weights), _combined_rows(model, known, weights)
    return Plain(of_pairs(model, name, pairs, copies, rows), fits)


def of_pairs(
    model: nn.Module,
    name: str,
    pairs: Mapping[str, Pair],
    copies: Mapping[str, Mapping[str, Tensor]] | None = None,
    rows: tuple[Mapping[str, TokenRows], Mapping[str, Tensor]] = ({}, {}),
) -> Adapter:
    """Put plain LoRA of scale 1 with these pairs, by module path, into the model, as the active adapter.

    Args:
        copies: path → state of the modules trained whole.
        rows: of tokens, by path: which, and what is in them.
    """
    sites = {path: {"A": pair.down, "B": pair.up} for path, pair in pairs.items()}
    config, tensors = peft_format.pairs_to_files(model, sites, copies=copies, rows=rows)
    return placed(model, name, peft_format.from_files(model, config, tensors, None, f"adapter {name!r}"))


def convert(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default", alpha: float | None = None) -> Converted:
    """Put the adapter in another library's file into `model`, as the active one.

    Read are loralib, torchtune, mlx-lm and LyCORIS/kohya; `lorakin.storage.foreign` has the names and the scale of each.

    Args:
        model: its base.
        path: the file, or the directory that holds it.
        name: the name it gets here.
        alpha: where the file does not say it: the scale is alpha/rank.

    Raises:
        AdapterError: an unknown format, left-over or misshapen tensors, or a kind of adapter that is no low-rank pair.
        SettingError: the file needs an alpha.
    """
    model = root_of(model)
    found = read_foreign(Path(path), model, alpha=alpha)
    sites = {}
    alphas = {}
    for at, slots in found.sites.items():
        scale, rank = found.scales[at], len(slots["A"])
        plain = scale > 0  # PEFT has no other, so they go into B
        sites[at] = slots if plain else slots | {"B": scale * slots["B"]}
        alphas[at] = scale * rank if plain else float(rank)
    files = peft_format.pairs_to_files(model, sites, alphas=alphas)
    return Converted(placed(model, name, peft_format.from_files(model, *files, None, str(path))), found.format, found.notes)


class _Seen:
    """What modules see: samples of their inputs by path, and the root of E[x·xᵀ], made once for modules that share a sample."""

    def __init__(self, samples: Mapping[str, Tensor]) -> None:
        self.samples = samples
        self.last: tuple[Tensor | None, Tensor | None] = (None, None)

    def root(self, path: str) -> Tensor | None:
        if path not in self.samples:
            return None
        if self.last[0] is not self.samples[path]:
            self.last = (self.samples[path], root_of_samples(self.samples[path]))
        return self.last[1]

    def judged(self, fit: Fit, change: Pair, near: Pair, weight: Tensor, path: str) -> Fit:
        """The fit with the error of the outputs on the samples themselves, without what the root adds to them."""
        if path not in self.samples:
            return fit
        x = self.samples[path].to(weight.device)
        wide = weight.to(x.dtype)
        true = x @ (change.applied_to(wide) - wide).T
        apart = true - (x @ near.down.to(x.dtype).T) @ near.up.to(x.dtype).T
        return dataclasses.replace(fit, output_error=float(apart.norm() / true.norm().clamp(min=1e-30)))


def _check_limits(rank: int | None, error: float | None) -> None:
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise SettingError(f"rank must be a whole number of at least 1, not {rank!r}")
    if error is not None and not (is_finite_number(error) and 0 < error < 1):
        raise SettingError(f"error must be between 0 and 1, not {error!r}")


def _check_finite(change: Pair, adapter: Adapter, path: str) -> None:
    if not all(all_finite(part) for part in change if part is not None):
        raise StateError(f"adapter {adapter.name!r} holds NaN or infinity in {path}; it cannot be converted")


def _warn_if_missed(fits: Mapping[str, Fit], error: float | None) -> None:
    """Say where the rank, which wins, left more than the error that was asked for."""
    missed = [path for path, fit in fits.items() if error is not None and fit.asked > error]
    if missed:
        worst = max(missed, key=lambda path: fits[path].asked)
        warnings.warn(
            f"the rank leaves a relative error above {error:g} in {len(missed)} of {len(fits)} modules "
            f"({fits[worst].asked:.2g} in {worst}); allow a larger rank, or leave it open",
            LorakinWarning,
            stacklevel=4,
        )


def _portable(adapter: Adapter, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """All of one rank; refused if there is something that other readers do not take."""
    if copies := list(adapter.plan.copies):
        raise SettingError(f"the portable form cannot hold what is trained whole ({', '.join(copies)}); merge instead")
    if tokens := list(adapter.plan.tokens):
        raise SettingError(f"the portable form cannot hold trained rows of tokens ({', '.join(tokens)}); merge instead")
    strange = [path for path in pairs if adapter.site(path).layer not in (LinearLayer, TransposedLayer)]
    if strange:
        raise SettingError(f"{strange[0]} is no linear layer, which the portable form cannot hold; merge instead")
    most = -(-max(1, *(pair.down.shape[0] for pair in pairs.values())) // KERNEL) * KERNEL
    if most > LARGEST:
        warnings.warn(
            f"the portable form has rank {most}, and vLLM serves {LARGEST} at most; rank=… (--rank) makes it smaller",
            LorakinWarning,
            stacklevel=3,
        )
    return {path: padded(pair, most) for path, pair in pairs.items()}


def _combined_copies(
    model: nn.Module, known: Mapping[str, Adapter], weights: Mapping[str, float]
) -> dict[str, dict[str, Tensor]]:
    """Each module trained whole: the base's, plus the weighted changes. What is not floating is the last adapter's."""
    states: dict[str, dict[str, Tensor]] = {}
    for one, weight in weights.items():
        for path in known[one].plan.copies if weight else ():
            own = base_state(model.get_submodule(path))
            state = states.setdefault(path, dict(own))
            for key, value in known[one].copy_of(path).state_dict().items():
                state[key] = state[key] + weight * (value - own[key]) if value.is_floating_point() else value
    return states


def _combined_rows(
    model: nn.Module, known: Mapping[str, Adapter], weights: Mapping[str, float]
) -> tuple[dict[str, TokenRows], dict[str, Tensor]]:
    """The rows that any of them trains: the base's, plus the weighted changes."""
    used = [(ids_at(known[one].plan.tokens), known[one], weight) for one, weight in weights.items() if weight]
    ids: dict[str, set[int]] = {}
    for own, _, _ in used:
        for path, tokens in own.items():
            ids.setdefault(path, set()).update(tokens)
    every = {path: TokenRows(tuple(sorted(tokens))) for path, tokens in ids.items()}
    values = base_rows(model, every)
    for own, adapter, weight in used:
        base = base_rows(model, {path: TokenRows(tokens) for path, tokens in own.items()})
        for path, tokens in own.items():
            at = torch.tensor([every[path].ids.index(token) for token in tokens], device=base[path].device)
            values[path].index_add_(0, at, weight * (adapter.rows_at(path).to(base[path]) - base[path]))
    named = {path: tokens.ids for path, tokens in every.items()}
    found = tied_rows(model, named, joins=lambda one, other: other in values and torch.equal(values[one], values[other]))
    return found, {path: values[path] for path in found}
