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
    """Puts one adapter into the model that combines those named, and activates it.

    PEFT: `add_weighted_adapter`. By default it changes each weight by Σ weight · change. Without
    rank or error that is exact: the pairs stand side by side, and their ranks add up. Modules
    trained whole and biases are combined by `how` too, trained token rows by the weighted sum.

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
    combination = checked_combination(
        how=how, on=on, density=density, elect=elect, seed=seed, rank=rank, error=error
    )
    mixture = _Mixture(_chosen(model, weights), weights, combination)
    pairs, fits = mixture.pairs(rank, error)
    warn_if_missed(fits, error)
    # In this order: DARE draws from one generator for all parts.
    whole_modules = mixture.whole_modules()
    rows, buffers, biases = mixture.rows(), mixture.buffers(), mixture.biases()
    adapter = insert_pairs(model, name, pairs, whole_modules, rows, buffers, biases)
    return FittedLoRA(adapter, fits)


def checked_combination(
    *, rank: int | None = None, error: float | None = None, **settings: Any
) -> Combination:
    """Returns how adapters are combined, from the settings of `combine`.

    Raises:
        SettingError: settings that do not fit together or with the limits on rank and error.
    """
    check_limits(rank, error)
    combination = Combination(**settings)
    if not combination.is_low_rank and rank is None and error is None:
        raise SettingError(
            f"how={combination.how!r} on changes has a result of full rank; name the rank or the "
            "error of its nearest pair (rank=…, error=…; --rank, --error), or combine the factors "
            '(on="factors"; --on factors)'
        )
    return combination


def _chosen(model: nn.Module, weights: Mapping[str, float]) -> list[Adapter]:
    """Returns the adapters of the model whose weight is not 0, in the order of `weights`."""
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
    by_name = adapters(model)
    if missing := [name for name in weights if name not in by_name]:
        raise SettingError(
            f"no adapter {missing[0]!r} in the model; there are: "
            f"{', '.join(map(repr, by_name)) or 'none'}"
        )
    return [by_name[name] for name, weight in weights.items() if weight]


class TensorVersions(NamedTuple):
    """One tensor of the base, None if unknown, and what some adapters have in its place."""

    base: Tensor | None
    of_adapters: list[tuple[Adapter, Tensor]]


class _Mixture:
    """The parts of the new adapter: those of the chosen adapters, combined."""

    def __init__(
        self, chosen: Sequence[Adapter], weights: Mapping[str, float], combination: Combination
    ) -> None:
        self.model, self.adapters, self.weights = chosen[0].model, chosen, weights
        self.combination, self.generator = combination, combination.generator()

    def pairs(
        self, rank: int | None, error: float | None
    ) -> tuple[dict[str, Pair], dict[str, Fit]]:
        """Returns by path the combined pair, and how near it is to the combined change."""
        changes_at: dict[str, list[tuple[Adapter, Pair]]] = {}
        for adapter in self.adapters:
            for path, change in _changes(adapter).items():
                changes_at.setdefault(path, []).append((adapter, change))

        pairs, fits = {}, {}
        for path, changes_of_adapters in changes_at.items():
            owners = [adapter for adapter, _ in changes_of_adapters]
            changes = [change for _, change in changes_of_adapters]
            weights = self._weights_of(owners)
            if not self.combination.is_low_rank:
                matrix = self.combination.of_pairs(changes, weights, self.generator)
                pairs[path], fits[path] = nearest_to(matrix, rank=rank, error=error)
                continue
            if self.combination.on == "change":
                combined = _side_by_side(changes, weights)
            else:
                combined = self._of_factors(path, owners)
            pairs[path], fits[path] = nearest(combined, combined.up, rank=rank, error=error)
        return pairs, fits

    def _of_factors(self, path: str, owners: Sequence[Adapter]) -> Pair:
        """Returns A and B of one module, each combined by itself."""
        scaled_pairs = [adapter.tensors.saved_scaled_pair(path) for adapter in owners]
        pairs, scales = [pair for pair, _ in scaled_pairs], [scale for _, scale in scaled_pairs]
        ranks = [len(pair.down) for pair in pairs]
        if len(set(ranks)) > 1:
            ranks_in_words = ", ".join(
                f"{adapter.name!r} has rank {rank}"
                for adapter, rank in zip(owners, ranks, strict=True)
            )
            raise SettingError(
                f"only factors of one rank can be combined, but in {path} {ranks_in_words}; "
                'combine the changes instead (on="change"; --on change)'
            )
        return self.combination.of_factors(pairs, scales, self._weights_of(owners), self.generator)

    def whole_modules(self) -> dict[str, dict[str, Tensor]]:
        """Returns by path the state of each module that is trained whole."""
        versions: dict[tuple[str, str], TensorVersions] = {}
        for path in dict.fromkeys(
            path for adapter in self.adapters for path in adapter.placement.whole_modules
        ):
            owners = [
                adapter for adapter in self.adapters if path in adapter.placement.whole_modules
            ]
            states = [adapter.tensors.copy_of(path).state_dict() for adapter in owners]
            for key, base in base_state(self.model.get_submodule(path)).items():
                tensors = [state[key] for state in states]
                of_adapters = list(zip(owners, tensors, strict=True))
                versions[path, key] = TensorVersions(base, of_adapters)

        states_by_path: dict[str, dict[str, Tensor]] = {}
        for (path, key), tensor in self._combined(versions, self.combination).items():
            states_by_path.setdefault(path, {})[key] = tensor
        return states_by_path

    def biases(self) -> dict[str, Tensor]:
        """Returns by path the biases that the new adapter trains.

        A file can only say "lora_only" or "all", so the smaller one that covers all biases is
        taken. A bias that no adapter has is the base's.
        """
        trained = {path for adapter in self.adapters for path in adapter.placement.biases}
        if not trained:
            return {}
        adapted = {path for adapter in self.adapters for path in adapter.placement.methods}
        whole = [path for adapter in self.adapters for path in adapter.placement.whole_modules]
        which = ALL if trained - adapted_modules(self.model, adapted) else ADAPTED
        base = initial_biases(self.model, find_biases(self.model, which, adapted, whole))
        biases_of = [(adapter, adapter.tensors.biases()) for adapter in self.adapters]
        versions = {
            path: TensorVersions(
                bias, [(adapter, biases[path]) for adapter, biases in biases_of if path in biases]
            )
            for path, bias in base.items()
            if path in trained
        }
        return base | self._combined(versions, self.combination)

    def buffers(self) -> dict[str, Tensor]:
        """Returns by name each buffer that training moved, by the weighted sum."""
        versions: dict[str, TensorVersions] = {}
        for adapter in self.adapters:
            for name, moved in adapter.tensors.moved_buffers().items():
                base = adapter.tensors.base_buffer(name)
                versions.setdefault(name, TensorVersions(base, [])).of_adapters.append(
                    (adapter, moved)
                )
        return self._combined(versions, Combination())

    def rows(self) -> tuple[dict[str, TokenRows], dict[str, Tensor]]:
        """Returns which token rows any adapter trains, and their values, by the weighted sum."""
        ids_of = [(adapter, ids_at(adapter.placement.tokens)) for adapter in self.adapters]
        all_ids: dict[str, set[int]] = {}
        for _, ids_by_path in ids_of:
            for path, ids in ids_by_path.items():
                all_ids.setdefault(path, set()).update(ids)
        tokens = {path: TokenRows(tuple(sorted(ids))) for path, ids in all_ids.items()}

        base = base_rows(self.model, tokens)
        versions = {path: TensorVersions(rows, []) for path, rows in base.items()}
        for adapter, ids_by_path in ids_of:
            for path, ids in ids_by_path.items():
                positions = [tokens[path].ids.index(token) for token in ids]
                rows = base[path].clone()
                rows[positions] = adapter.tensors.rows_at(path).to(rows)
                versions[path].of_adapters.append((adapter, rows))
        values = self._combined(versions, Combination())

        def same_values(path: str, other: str) -> bool:
            return other in values and torch.equal(values[path], values[other])

        ids_by_path = {path: rows.ids for path, rows in tokens.items()}
        tied = tied_rows(self.model, ids_by_path, same_values=same_values)
        return tied, {path: values[path] for path in tied}

    def _combined(
        self, versions: Mapping[Key, TensorVersions], combination: Combination
    ) -> dict[Key, Tensor]:
        """Returns each tensor of the base plus the combined changes, in float32 at least.

        Integer tensors, such as `num_batches_tracked`, and tensors of another shape are not
        combined: the last adapter's is taken.
        """
        combined = {}
        for key, (base, of_adapters) in versions.items():
            combined[key] = of_adapters[-1][1]
            if base is None or not base.is_floating_point():
                continue
            if any(tensor.shape != base.shape for _, tensor in of_adapters):
                continue
            wide = base.to(wide_dtype(base.dtype))
            row_count = len(base) if base.dim() else 1
            changes = [(tensor.to(wide) - wide).reshape(row_count, -1) for _, tensor in of_adapters]
            weights = self._weights_of([adapter for adapter, _ in of_adapters])
            change = combination.of_matrices(changes, weights, self.generator)
            combined[key] = (wide + change.view(base.shape)).to(base.dtype)
        return combined

    def _weights_of(self, owners: Sequence[Adapter]) -> list[float]:
        return [self.weights[adapter.name] for adapter in owners]


def _changes(adapter: Adapter) -> dict[str, Pair]:
    """Returns by path the adapter's change, which must be finite and without a gain."""
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
    """Returns the weighted sum of pairs, exactly: their ranks add up."""
    ups = [weight * change.up for change, weight in zip(changes, weights, strict=True)]
    return Pair(torch.cat(ups, 1), torch.cat([change.down for change in changes], 0))
