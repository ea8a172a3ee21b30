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
from lorakin.errors import LorakinWarning, SettingError, StateError, some
from lorakin.family import Pair, all_finite
from lorakin.family.combining import Combination
from lorakin.family.low_rank import Fit, nearest, nearest_to, padded, root_of_samples
from lorakin.family.settings import is_finite_number
from lorakin.inject.attachments import base_state
from lorakin.inject.biases import ADAPTED, ALL, adapted_modules, find_biases, start_of
from lorakin.inject.calibration_inputs import input_samples
from lorakin.inject.layers import LinearLayer, TransposedLayer
from lorakin.inject.model_registry import root_of
from lorakin.inject.tokens import TokenRows, base_rows, ids_at, tied_rows
from lorakin.storage.document import Document
from lorakin.storage.foreign.read import read_foreign
from lorakin.storage.match import match
from lorakin.storage.plain import of_pairs as document_of_pairs

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
        raise SettingError(
            f"batches must be a list of mappings that the model takes as keywords, not {str(batches)[:80]}"
        )
    seen = _Seen(input_samples(adapter, list(batches)) if batches else {})
    pairs, fits = {}, {}
    for path in adapter.placement.methods:
        change = adapter.tensors.change_at(path)
        if change.gain is not None and rank is None and error is None:
            raise SettingError(
                f"adapter {adapter.name!r} ({adapter.placement.method.words}) scales the base weight by a gain ({path}, …), which "
                "no plain LoRA does exactly. Name a rank or an error for the nearest one (rank=…, error=…; --rank, --error), "
                "or merge it into the model, which is exact"
            )
        _check_finite(change, adapter, path)
        weight = adapter.tensors.base_weight(path)
        pairs[path], fit = nearest(change, weight, rank=rank, error=error, root=seen.root(path))
        fits[path] = seen.judged(fit, change, pairs[path], weight, path)
    _warn_if_missed(fits, error)
    copies = {path: adapter.tensors.copy_of(path).state_dict() for path in adapter.placement.copies}
    rows = (
        adapter.placement.tokens,
        {path: adapter.tensors.rows_at(path) for path in adapter.placement.tokens},
    )
    if portable:
        pairs = _portable(adapter, pairs)
    plain = of_pairs(
        adapter.model,
        name,
        pairs,
        copies,
        rows,
        adapter.tensors.moved_buffers(),
        adapter.tensors.biases(),
    )
    return Plain(plain, fits)


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str = "combined",
    *,
    how: str = "sum",
    on: str = "change",
    density: float | None = None,
    elect: str | None = None,
    seed: int | None = None,
    rank: int | None = None,
    error: float | None = None,
) -> Plain:
    """Put one adapter in the model that changes each weight by Σ weight · change, over the adapters named, and make it active.

    The sum is exact without rank or error: the pairs stand beside each other, and ranks add up. Modules trained whole and
    biases change by what `how` makes of their changes too, trained rows of tokens by the weighted sum.

        lk.combine(model, {"a": 0.7, "b": 0.3})
        lk.combine(model, {"a": 1, "b": 1}, how="ties", density=0.2, rank=32)

    Args:
        model: holds the adapters.
        weights: adapter's name → weight; any number, 0 leaves it out.
        name: of the new adapter.
        how: `sum`; `ties`, `magnitude_prune`, `dare_linear` or `dare_ties`, which drop entries of each change first, module by
            module; `lorakin.family.combining` has the formulas. Their result is of full rank, so name a rank or an error.
        on: `change`, the product B·A, for adapters of any ranks; `factors`, A and B each by itself, for those of one rank: what
            PEFT's `linear`, `ties` … without `_svd` do, the product of the sums instead of the sum of the products.
        density: the share of entries that is kept, in (0, 1]; for all but the sum.
        elect: of TIES, how a sign is elected: by the `total` (the default) or the `frequency`.
        seed: of what DARE draws; 0 by default.
        rank, error: see `as_lora`; the nearest pair of that rank, or within that error.

    Raises:
        SettingError: no adapter of that name; one with a gain (DoRA), whose change is no pair; settings that do not fit `how`;
            factors of different ranks.
        StateError: an adapter is merged.
    """
    model = root_of(model)
    rule = checked_combination(
        how=how, on=on, density=density, elect=elect, seed=seed, rank=rank, error=error
    )
    known = _chosen(model, weights)
    parts: dict[str, list[tuple[Adapter, Pair]]] = {}
    for adapter in known:
        if adapter.is_merged:
            raise StateError(f"adapter {adapter.name!r} is merged; unmerge it before combining it")
        for path in adapter.placement.methods:
            change = adapter.tensors.change_at(path)
            _check_finite(change, adapter, path)
            if change.gain is not None:
                raise SettingError(
                    f"adapter {adapter.name!r} ({adapter.placement.method.words}) scales the base weight by a gain, so its change "
                    "cannot be added to others; make a plain LoRA of it first: lorakin.as_lora, or lorakin export --to lora"
                )
            parts.setdefault(path, []).append((adapter, change))
    pairs, fits, generator = {}, {}, rule.generator()
    for path, there in parts.items():
        each = [weights[adapter.name] for adapter, _ in there]
        if rule.is_low_rank:
            whole = (
                _summed(there, each)
                if on == "change"
                else _of_factors(rule, path, there, each, generator)
            )
            pairs[path], fits[path] = nearest(whole, whole.up, rank=rank, error=error)
        else:
            combined = rule.of_pairs([change for _, change in there], each, generator)
            pairs[path], fits[path] = nearest_to(combined, rank=rank, error=error)
    _warn_if_missed(fits, error)
    copies = _combined_copies(model, known, weights, rule, generator)
    rows, buffers = _combined_rows(model, known, weights), _summed_buffers(known, weights)
    biases = _combined_biases(model, known, weights, rule, generator)
    return Plain(of_pairs(model, name, pairs, copies, rows, buffers, biases), fits)


def checked_combination(
    *, rank: int | None = None, error: float | None = None, **settings: Any
) -> Combination:
    """How adapters become one, from the settings of `combine`.

    Raises:
        SettingError: settings that do not fit together, also with the limits on the rank and the error.
    """
    _check_limits(rank, error)
    rule = Combination(**settings)
    if not rule.is_low_rank and rank is None and error is None:
        raise SettingError(
            f"how={rule.how!r} on changes makes one of full rank; name the rank, or the error, of its nearest pair (rank=…, "
            'error=…; --rank, --error), or combine the factors (on="factors"; --on factors)'
        )
    return rule


def _chosen(model: nn.Module, weights: Mapping[str, float]) -> list[Adapter]:
    """The adapters of the model that have a weight other than 0, as `weights` names them."""
    if not isinstance(weights, Mapping) or not all(
        is_finite_number(weight) for weight in weights.values()
    ):
        raise SettingError(
            f"expected an adapter's name → its weight, a finite number, for each adapter, not {weights!r}"
        )
    if not any(weights.values()):
        raise SettingError(
            f"there is nothing to combine in {dict(weights)!r}: name at least one adapter with a weight other than 0"
        )
    known = adapters(model)
    if missing := [one for one in weights if one not in known]:
        raise SettingError(
            f"no adapter {missing[0]!r} in the model; there are: {', '.join(map(repr, known)) or 'none'}"
        )
    return [known[one] for one, weight in weights.items() if weight]


def _summed(there: Sequence[tuple[Adapter, Pair]], weights: Sequence[float]) -> Pair:
    """Pairs side by side: their weighted sum, exactly."""
    ups = [weight * change.up for (_, change), weight in zip(there, weights, strict=True)]
    return Pair(torch.cat(ups, 1), torch.cat([change.down for _, change in there], 0))


def _of_factors(
    rule: Combination,
    path: str,
    there: Sequence[tuple[Adapter, Pair]],
    weights: Sequence[float],
    generator: torch.Generator,
) -> Pair:
    """The pair of factors combined each by itself."""
    factors = [adapter.tensors.factors_at(path) for adapter, _ in there]
    ranks = {
        adapter.name: len(pair.down) for (adapter, _), (pair, _) in zip(there, factors, strict=True)
    }
    if len(set(ranks.values())) > 1:
        said = ", ".join(f"{name!r} has rank {rank}" for name, rank in ranks.items())
        raise SettingError(
            f"factors can be combined only if they are of one rank, but in {path} {said}; combine the changes instead "
            '(on="change"; --on change)'
        )
    return rule.of_factors(
        [pair for pair, _ in factors], [scale for _, scale in factors], weights, generator
    )


def of_pairs(
    model: nn.Module,
    name: str,
    pairs: Mapping[str, Pair],
    copies: Mapping[str, Mapping[str, Tensor]] | None = None,
    rows: tuple[Mapping[str, TokenRows], Mapping[str, Tensor]] = ({}, {}),
    buffers: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Put plain LoRA of scale 1 with these pairs, by module path, into the model, as the active adapter.

    Args:
        copies: path → state of the modules trained whole.
        rows: of tokens, by path: which, and what is in them.
        buffers: name → a buffer of the base that training moved.
        biases: path → a bias in place of the base's.
    """
    slots = {path: {"A": pair.down, "B": pair.up} for path, pair in pairs.items()}
    document = document_of_pairs(
        model, slots, copies=copies, rows=rows, biases=biases, buffers=buffers
    )
    return _placed(model, name, document, f"adapter {name!r}")


def _placed(model: nn.Module, name: str, document: Document, where: str) -> Adapter:
    """Put a document made in memory into the model; its tensors are copied."""
    return placed(model, name, match(document, model, where).copied())


def convert(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    alpha: float | None = None,
) -> Converted:
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
    for at, slots in found.slots.items():
        scale, rank = found.scales[at], len(slots["A"])
        plain = scale > 0  # PEFT has no other, so they go into B
        sites[at] = slots if plain else slots | {"B": scale * slots["B"]}
        alphas[at] = scale * rank if plain else float(rank)
    document = document_of_pairs(model, sites, alphas=alphas)
    return Converted(_placed(model, name, document, str(path)), found.format, found.notes)


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
        return dataclasses.replace(
            fit, output_error=float(apart.norm() / true.norm().clamp(min=1e-30))
        )


def _check_limits(rank: int | None, error: float | None) -> None:
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise SettingError(f"rank must be a whole number of at least 1, not {rank!r}")
    if error is not None and not (is_finite_number(error) and 0 < error < 1):
        raise SettingError(f"error must be between 0 and 1, not {error!r}")


def _check_finite(change: Pair, adapter: Adapter, path: str) -> None:
    if not all(all_finite(part) for part in change if part is not None):
        raise StateError(
            f"adapter {adapter.name!r} holds NaN or infinity in {path}; it cannot be converted"
        )


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
    if copies := list(adapter.placement.copies):
        raise SettingError(
            f"the portable form cannot hold what is trained whole ({', '.join(copies)}); merge instead"
        )
    if tokens := list(adapter.placement.tokens):
        raise SettingError(
            f"the portable form cannot hold trained rows of tokens ({', '.join(tokens)}); merge instead"
        )
    if biases := adapter.placement.biases:
        raise SettingError(f"the portable form cannot hold biases ({some(biases)}); merge instead")
    strange = [
        path
        for path in pairs
        if adapter.tensors.branch(path).layer not in (LinearLayer, TransposedLayer)
    ]
    if strange:
        raise SettingError(
            f"{strange[0]} is no linear layer, which the portable form cannot hold; merge instead"
        )
    most = -(-max(1, *(pair.down.shape[0] for pair in pairs.values())) // KERNEL) * KERNEL
    if most > LARGEST:
        warnings.warn(
            f"the portable form has rank {most}, and vLLM serves {LARGEST} at most; rank=… (--rank) makes it smaller",
            LorakinWarning,
            stacklevel=3,
        )
    return {path: padded(pair, most) for path, pair in pairs.items()}


def _summed_buffers(known: Sequence[Adapter], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Each buffer that training moved: the base's plus the weighted changes; a number of calls, the last adapter's."""
    found: dict[str, Tensor] = {}
    for adapter in known:
        for name, moved in adapter.tensors.moved_buffers().items():
            base = adapter.tensors.base_buffer(name)
            if base is None or base.shape != moved.shape or not moved.is_floating_point():
                found[name] = moved
            else:
                base = base.to(moved.device)
                found[name] = found.get(name, base) + weights[adapter.name] * (moved - base)
    return found


def _combined_biases(
    model: nn.Module,
    known: Sequence[Adapter],
    weights: Mapping[str, float],
    rule: Combination,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Each bias that one of the adapters has: the base's, plus the combined changes.

    Where only a part of what "lora_only" or "all" says is anyone's, the others are the base's.
    """
    paths = {path for adapter in known for path in adapter.placement.biases}
    sites = {path for adapter in known for path in adapter.placement.methods}
    whole = [path for adapter in known for path in adapter.placement.copies]
    if not paths:
        return {}
    found = start_of(
        model,
        find_biases(model, ALL if paths - adapted_modules(model, sites) else ADAPTED, sites, whole),
    )
    for path in [path for path in found if path in paths]:
        there = [adapter for adapter in known if path in adapter.placement.biases]
        changes = [
            (adapter.tensors.biases()[path].to(found[path]) - found[path]).unsqueeze(1)
            for adapter in there
        ]
        each = [weights[adapter.name] for adapter in there]
        found[path] = found[path] + rule.of_matrices(changes, each, generator).view(-1)
    return found


def _combined_copies(
    model: nn.Module,
    known: Sequence[Adapter],
    weights: Mapping[str, float],
    rule: Combination,
    generator: torch.Generator,
) -> dict[str, dict[str, Tensor]]:
    """Each module trained whole: the base's, plus the combined changes. What is not floating is the last adapter's."""
    states: dict[str, dict[str, Tensor]] = {}
    for path in dict.fromkeys(path for adapter in known for path in adapter.placement.copies):
        there = [adapter for adapter in known if path in adapter.placement.copies]
        own = base_state(model.get_submodule(path))
        found = [adapter.tensors.copy_of(path).state_dict() for adapter in there]
        each = [weights[adapter.name] for adapter in there]
        states[path] = {key: found[-1][key] for key in own}
        for key, base in own.items():
            if base.is_floating_point():
                wide = base.to(torch.promote_types(base.dtype, torch.float32))
                changes = [
                    (state[key] - wide).reshape(len(base) if base.dim() else 1, -1)
                    for state in found
                ]
                states[path][key] = (
                    wide + rule.of_matrices(changes, each, generator).view(base.shape)
                ).to(base.dtype)
    return states


def _combined_rows(
    model: nn.Module, known: Sequence[Adapter], weights: Mapping[str, float]
) -> tuple[dict[str, TokenRows], dict[str, Tensor]]:
    """The rows that any of them trains: the base's, plus the weighted changes."""
    used = [(ids_at(adapter.placement.tokens), adapter, weights[adapter.name]) for adapter in known]
    ids: dict[str, set[int]] = {}
    for own, _, _ in used:
        for path, tokens in own.items():
            ids.setdefault(path, set()).update(tokens)
    every = {path: TokenRows(tuple(sorted(tokens))) for path, tokens in ids.items()}
    values = base_rows(model, every)
    for own, adapter, weight in used:
        base = base_rows(model, {path: TokenRows(tokens) for path, tokens in own.items()})
        for path, tokens in own.items():
            at = torch.tensor(
                [every[path].ids.index(token) for token in tokens], device=base[path].device
            )
            values[path].index_add_(
                0, at, weight * (adapter.tensors.rows_at(path).to(base[path]) - base[path])
            )
    named = {path: tokens.ids for path, tokens in every.items()}
    found = tied_rows(
        model,
        named,
        joins=lambda one, other: other in values and torch.equal(values[one], values[other]),
    )
    return found, {path: values[path] for path in found}
