"""One adapter from several in one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lorakin.adapter import Adapter
from lorakin.conversion import FittedLoRA, check_finite, check_limits, insert_pairs, warn_if_missed
from lorakin.errors import SettingError, StateError
from lorakin.family import Pair
from lorakin.family.combining import Combination
from lorakin.family.low_rank import Fit, nearest, nearest_to
from lorakin.family.precision import wide_dtype
from lorakin.family.settings import is_finite_number
from lorakin.inject.attachments import base_state
from lorakin.inject.biases import ADAPTED, ALL, adapted_modules, find_biases, initial_biases
from lorakin.inject.model_registry import root_of
from lorakin.inject.trainable_tokens import TokenRows, base_rows, ids_at, tied_rows
from lorakin.switching import adapters

Key = TypeVar("Key")


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
) -> FittedLoRA:
    """Put one adapter into the model that combines those named, and activate it.

    By default it changes each weight by Σ weight · change. Without rank or error that is exact: the
    pairs stand side by side, and their ranks add up. Modules trained whole and biases are combined
    by `how` too, trained rows of tokens by the weighted sum.

    >>> import lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> for name in "ab":
    ...     adapter = lk.adapt(model, lk.LoRA(rank=2), "0", name=name)
    >>> lk.combine(model, {"a": 0.7, "b": 0.3}).fits["0"].rank
    4
    >>> ties = lk.combine(model, {"a": 1, "b": 1}, "ties", how="ties", density=0.2, rank=2)

    Args:
        model: holds the adapters.
        weights: adapter's name → weight, any number; 0 leaves the adapter out.
        name: the new adapter's name.
        how: `sum`; or `ties`, `magnitude_prune`, `dare_linear` or `dare_ties`, which drop entries
            of each change first, module by module (formulas: `lorakin.family.combining`). Their
            result has full rank, so name a rank or an error.
        on: `change`, the product B·A, for adapters of any ranks; or `factors`, A and B separately,
            for adapters of one rank. That is what PEFT's `linear`, `ties` … without `_svd` do: the
            product of the sums instead of the sum of the products.
        density: the share of entries to keep, in (0, 1]; for all but the sum.
        elect: how TIES elects a sign, by the `total` (the default) or the `frequency`.
        seed: of what DARE draws; 0 by default.
        rank, error: as in `as_lora`, for the nearest pair of that rank or within that error.

    Raises:
        SettingError: an unknown adapter; one with a gain (DoRA), whose change is no pair; settings
            that do not fit `how`; factors of different ranks.
        StateError: an adapter is merged.
    """
    model = root_of(model)
    rule = checked_combination(
        how=how, on=on, density=density, elect=elect, seed=seed, rank=rank, error=error
    )
    mixture = _Mixture(model, _chosen(model, weights), weights, rule, rule.generator())
    pairs, fits = mixture.pairs(rank, error)
    warn_if_missed(fits, error)
    copies = mixture.copies()
    rows, buffers, biases = mixture.rows(), mixture.buffers(), mixture.biases()
    return FittedLoRA(insert_pairs(model, name, pairs, copies, rows, buffers, biases), fits)


def checked_combination(
    *, rank: int | None = None, error: float | None = None, **settings: Any
) -> Combination:
    """How adapters become one, from the settings of `combine`.

    Raises:
        SettingError: settings that do not fit together or with the limits on rank and error.
    """
    check_limits(rank, error)
    rule = Combination(**settings)
    if not rule.is_low_rank and rank is None and error is None:
        raise SettingError(
            f"how={rule.how!r} on changes has a result of full rank; name the rank or the error of "
            "its nearest pair (rank=…, error=…; --rank, --error), or combine the factors "
            '(on="factors"; --on factors)'
        )
    return rule


def _chosen(model: nn.Module, weights: Mapping[str, float]) -> list[Adapter]:
    """The adapters of the model whose weight is not 0, in the order of `weights`."""
    if not isinstance(weights, Mapping) or not all(
        is_finite_number(weight) for weight in weights.values()
    ):
        raise SettingError(
            "weights must map adapters' names to finite numbers, such as {'a': 0.7, 'b': 0.3}, not "
            f"{weights!r}"
        )
    if not any(weights.values()):
        raise SettingError(
            f"there is nothing to combine in {dict(weights)!r}: name at least one adapter with a "
            "weight other than 0"
        )
    known = adapters(model)
    if missing := [one for one in weights if one not in known]:
        raise SettingError(
            f"no adapter {missing[0]!r} in the model; there are: "
            f"{', '.join(map(repr, known)) or 'none'}"
        )
    return [known[one] for one, weight in weights.items() if weight]


class Owned(NamedTuple):
    """A tensor of the base, None if unknown, and what adapters have in its place."""

    base: Tensor | None
    own: list[tuple[Adapter, Tensor]]


class _Mixture:
    """What the new adapter consists of: parts of the known ones, combined by one rule."""

    def __init__(
        self,
        model: nn.Module,
        known: Sequence[Adapter],
        weights: Mapping[str, float],
        rule: Combination,
        generator: torch.Generator,
    ) -> None:
        self.model, self.known, self.weights = model, known, weights
        self.rule, self.generator = rule, generator

    def pairs(
        self, rank: int | None, error: float | None
    ) -> tuple[dict[str, Pair], dict[str, Fit]]:
        """Path → the combined pair, and how near it is to the combined change."""
        parts: dict[str, list[tuple[Adapter, Pair]]] = {}
        for adapter in self.known:
            for path, change in _changes(adapter).items():
                parts.setdefault(path, []).append((adapter, change))

        pairs, fits = {}, {}
        for path, there in parts.items():
            changes = [change for _, change in there]
            each = [self.weights[adapter.name] for adapter, _ in there]
            if not self.rule.is_low_rank:
                matrix = self.rule.of_pairs(changes, each, self.generator)
                pairs[path], fits[path] = nearest_to(matrix, rank=rank, error=error)
                continue
            if self.rule.on == "change":
                whole = _side_by_side(changes, each)
            else:
                whole = self._of_factors(path, [adapter for adapter, _ in there], each)
            pairs[path], fits[path] = nearest(whole, whole.up, rank=rank, error=error)
        return pairs, fits

    def _of_factors(self, path: str, there: Sequence[Adapter], weights: Sequence[float]) -> Pair:
        """A and B of one module, each combined by itself."""
        factors = [adapter.tensors.saved_scaled_pair(path) for adapter in there]
        ranks = [len(pair.down) for pair, _ in factors]
        if len(set(ranks)) > 1:
            said = ", ".join(
                f"{adapter.name!r} has rank {rank}"
                for adapter, rank in zip(there, ranks, strict=True)
            )
            raise SettingError(
                f"only factors of one rank can be combined, but in {path} {said}; combine the "
                'changes instead (on="change"; --on change)'
            )
        pairs, scales = [pair for pair, _ in factors], [scale for _, scale in factors]
        return self.rule.of_factors(pairs, scales, weights, self.generator)

    def copies(self) -> dict[str, dict[str, Tensor]]:
        """Path → the state of each module that is trained whole."""
        there: dict[tuple[str, str], Owned] = {}
        for path in dict.fromkeys(
            p for adapter in self.known for p in adapter.placement.whole_modules
        ):
            owners = [adapter for adapter in self.known if path in adapter.placement.whole_modules]
            states = [adapter.tensors.copy_of(path).state_dict() for adapter in owners]
            for key, base in base_state(self.model.get_submodule(path)).items():
                own = [(one, state[key]) for one, state in zip(owners, states, strict=True)]
                there[path, key] = Owned(base, own)

        found: dict[str, dict[str, Tensor]] = {}
        for (path, key), tensor in self._combined(there, self.rule).items():
            found.setdefault(path, {})[key] = tensor
        return found

    def biases(self) -> dict[str, Tensor]:
        """Path → each bias of "lora_only" or "all"; those that no adapter has are the base's."""
        paths = {path for adapter in self.known for path in adapter.placement.biases}
        if not paths:
            return {}
        branches = {path for adapter in self.known for path in adapter.placement.methods}
        whole = [path for adapter in self.known for path in adapter.placement.whole_modules]
        which = ALL if paths - adapted_modules(self.model, branches) else ADAPTED
        found = initial_biases(self.model, find_biases(self.model, which, branches, whole))
        there = {
            path: Owned(
                found[path],
                [(a, a.tensors.biases()[path]) for a in self.known if path in a.tensors.biases()],
            )
            for path in found
            if path in paths
        }
        return found | self._combined(there, self.rule)

    def buffers(self) -> dict[str, Tensor]:
        """Name → each buffer that training moved, by the weighted sum."""
        there: dict[str, Owned] = {}
        for adapter in self.known:
            for name, moved in adapter.tensors.moved_buffers().items():
                owned = there.setdefault(name, Owned(adapter.tensors.base_buffer(name), []))
                owned.own.append((adapter, moved))
        return self._combined(there, Combination())

    def rows(self) -> tuple[dict[str, TokenRows], dict[str, Tensor]]:
        """Which rows of tokens any adapter trains, and their values, by the weighted sum."""
        used = [(adapter, ids_at(adapter.placement.tokens)) for adapter in self.known]
        ids: dict[str, set[int]] = {}
        for _, own in used:
            for path, tokens in own.items():
                ids.setdefault(path, set()).update(tokens)
        every = {path: TokenRows(tuple(sorted(tokens))) for path, tokens in ids.items()}

        base = base_rows(self.model, every)
        there = {path: Owned(rows, []) for path, rows in base.items()}
        for adapter, own in used:
            for path, tokens in own.items():
                at = [every[path].ids.index(token) for token in tokens]
                rows = base[path].clone()
                rows[at] = adapter.tensors.rows_at(path).to(rows)
                there[path].own.append((adapter, rows))
        values = self._combined(there, Combination())

        found = tied_rows(
            self.model,
            {path: tokens.ids for path, tokens in every.items()},
            same_values=lambda one, other: (
                other in values and torch.equal(values[one], values[other])
            ),
        )
        return found, {path: values[path] for path in found}

    def _combined(self, there: Mapping[Key, Owned], rule: Combination) -> dict[Key, Tensor]:
        """Each tensor of the base plus the combined changes, computed in float32 at least.

        If there is no difference to add, as for a number of calls, the last adapter's tensor stays.
        """
        found = {}
        for key, (base, own) in there.items():
            found[key] = own[-1][1]
            if base is None or not base.is_floating_point():
                continue
            if any(tensor.shape != base.shape for _, tensor in own):
                continue
            wide = base.to(wide_dtype(base.dtype))
            rows = len(base) if base.dim() else 1
            changes = [(tensor.to(wide) - wide).reshape(rows, -1) for _, tensor in own]
            each = [self.weights[adapter.name] for adapter, _ in own]
            change = rule.of_matrices(changes, each, self.generator)
            found[key] = (wide + change.view(base.shape)).to(base.dtype)
        return found


def _changes(adapter: Adapter) -> dict[str, Pair]:
    """Path → the adapter's change, which must be finite and without a gain."""
    if adapter.is_merged:
        raise StateError(f"adapter {adapter.name!r} is merged; unmerge it before combining it")
    changes = {}
    for path in adapter.placement.methods:
        change = changes[path] = adapter.tensors.saved_change(path)
        check_finite(change, adapter, path)
        if change.gain is not None:
            raise SettingError(
                f"adapter {adapter.name!r} ({adapter.placement.method.words}) scales the base "
                "weight by a gain, so its change cannot be added to others; make a plain LoRA of "
                "it first: lorakin.as_lora, or lorakin export --to lora"
            )
    return changes


def _side_by_side(changes: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """The weighted sum of pairs, exactly: their ranks add up."""
    ups = [weight * change.up for change, weight in zip(changes, weights, strict=True)]
    return Pair(torch.cat(ups, 1), torch.cat([change.down for change in changes], 0))
