"""Merging adapters into the weights of a model: reversibly, or for good.

`folding.py` does it in one module. Here it is done in all modules of some adapters or in none, and
parameters that are tied stay one as far as they can.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lorakin.errors import LorakinWarning, SettingError, StateError
from lorakin.inject import quantised
from lorakin.inject.adapted import attachments_at, is_adapted, module_at
from lorakin.inject.biases import check_biases_distinct, share_merged_biases
from lorakin.inject.folding import check_for_good, check_together, move_adapters, set_merged
from lorakin.inject.model_registry import (
    NO_ADAPTERS,
    check_base_in_place,
    check_no_mixed_batch,
    registry_of,
    watch_modules,
)
from lorakin.inject.placement import Placement
from lorakin.inject.threads import changing
from lorakin.inject.ties import Ties
from lorakin.inject.trainable_tokens import keep_ties, paths_with_rows

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter


def merge_for_good(model: nn.Module, names: str | Sequence[str]) -> None:
    """Folds these adapters into the weights permanently, all at once; they leave the model.

    What the model computes with them in use does not change. `[]` does nothing. Other adapters may
    stay if their changes add to any weights.

    Raises:
        SettingError: an unknown name.
        StateError: a merged weight would not be finite, an adapter is disabled, another one is
            merged, or one that stays has a gain over a weight that would change. Then nothing is
            merged.
    """
    with changing(model):
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        adapters = registry_of(model).adapters
        if unknown := [name for name in names if name not in adapters]:
            present = ", ".join(map(repr, adapters)) or NO_ADAPTERS
            raise SettingError(f"no adapter {unknown[0]!r} in the model; there are: {present}")

        chosen = [adapters[name] for name in names]
        others = {name: adapter for name, adapter in adapters.items() if adapter not in chosen}
        merged = [name for name, adapter in others.items() if adapter.effect.is_merged]
        if chosen and merged:
            raise StateError(
                f"adapter {merged[0]!r} is merged too; unmerge it before merging {names[0]!r} for "
                "good"
            )
        check_for_good(placements(chosen), placements(others.values()))

        if plain_weights := merge_adapters(model, chosen):
            warn_of_plain_weights(plain_weights, stacklevel=3, permanent=True)
        for path in (path for adapter in chosen for path in adapter.tensors.paths()):
            attached = attachments_at(model, path)
            attached.base_before_merge, attached.base_before_move = {}, {}
            attached.merged, attached.merged_weight = (), None
        for adapter in chosen:
            registry_of(model).buffers.hand_to_base(model, adapter)
            adapter.remove()

        quantised_modules = {path: module_at(model, path) for path in plain_weights}
        quantised.replace(model, plain_weights)
        for path, quantised_module in quantised_modules.items():
            if is_adapted(quantised_module):
                move_adapters(quantised_module, module_at(model, path))
        if (registry := registry_of(model)).adapters:
            registry.ties = Ties(model)
            watch_modules(model, registry)


def merge_adapters(model: nn.Module, chosen: Sequence[InsertedAdapter]) -> dict[str, Tensor]:
    """Merges these adapters, all or none.

    Returns:
        the merged weight of each quantised layer, by path.
    """
    check_no_mixed_batch(model, "merged")
    if disabled := [adapter.name for adapter in chosen if adapter.effect.is_off]:
        raise StateError(
            f"adapter {disabled[0]!r} is disabled at the moment; merge it outside of disabled()"
        )
    others = [adapter for adapter in registry_of(model).adapters.values() if adapter not in chosen]
    touching = {adapter.name: adapter for adapter in others if _share_a_module(adapter, chosen)}
    check_base_in_place(touching, "merging")
    merged_before = [adapter for adapter in others if adapter.effect.is_merged]
    check_together(placements([*chosen, *merged_before]))
    in_use = [
        adapter
        for adapter in others
        if adapter.effect.is_merged or (adapter.effect.is_active and not adapter.effect.is_off)
    ]
    check_biases_distinct(placements([*chosen, *in_use]), StateError)

    dtype = quantised.dtype_of(model)
    before = {
        path: attachments_at(model, path).merged
        for adapter in chosen
        for path in adapter.tensors.paths()
    }
    with ties_restored(model):
        try:
            for adapter in chosen:
                for path in adapter.tensors.paths():
                    if adapter.name not in (merged := attachments_at(model, path).merged):
                        set_merged(module_at(model, path), path, (*merged, adapter.name), dtype)
                share_merged_biases(model, adapter)
            share_merged_tables(model)
        except BaseException:
            for path, merged in before.items():
                set_merged(module_at(model, path), path, merged, dtype)
            raise

    merged_weights = {path: attachments_at(model, path).merged_weight for path in before}
    return {path: weight for path, weight in merged_weights.items() if weight is not None}


def share_merged_tables(model: nn.Module) -> None:
    """Lets tied tables stay one, if the same adapters with trained rows are merged into them."""
    for adapter in registry_of(model).adapters.values():
        tokens = adapter.placement.tokens
        merged = {path: attachments_at(model, path).merged for path in paths_with_rows(tokens)}
        keep_ties(model, tokens, merged)


@contextlib.contextmanager
def ties_restored(model: nn.Module) -> Iterator[None]:
    """Restores ties while merged weights change inside a `with` block, then separates them again.

    They are separated where merging has made their weights different.
    """
    ties = registry_of(model).ties
    if ties is None:
        yield
        return
    ties.restore()
    try:
        yield
    finally:
        ties.separate(model)


def placements(adapters: Iterable[InsertedAdapter]) -> dict[str, Placement]:
    """Returns the adapters' placements by name."""
    return {adapter.name: adapter.placement for adapter in adapters}


def _share_a_module(adapter: InsertedAdapter, others: Sequence[InsertedAdapter]) -> bool:
    """Returns whether an adapter is on a module that one of the others is on too."""
    return any(set(adapter.tensors.paths()) & set(other.tensors.paths()) for other in others)


def warn_of_plain_weights(
    plain_weights: Mapping[str, Tensor], stacklevel: int, permanent: bool
) -> None:
    """Warns that merging into a quantised base makes plain weights, and how large they are."""
    size = sum(weight.numel() * weight.element_size() for weight in plain_weights.values())
    not_saved = (
        ""
        if permanent
        else ", which save_pretrained does not write before they are merged for good"
    )
    warnings.warn(
        f"the base is quantised: merged, its {len(plain_weights)} adapted layers are "
        f"{next(iter(plain_weights.values())).dtype} and take {size / 2**20:,.1f} MiB{not_saved}. "
        "To keep what was learned in a full-precision model, merge into the base that was "
        "quantised, with lorakin merge --model",
        LorakinWarning,
        stacklevel=stacklevel + 1,
    )
