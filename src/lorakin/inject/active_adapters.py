"""Which of a model's adapters are active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from lorakin.errors import SettingError, StateError
from lorakin.inject.adapted import attachments_at
from lorakin.inject.biases import check_biases_distinct
from lorakin.inject.merging import placements
from lorakin.inject.model_registry import (
    NO_ADAPTERS,
    check_base_in_place,
    check_no_mixed_batch,
    registry_of,
)
from lorakin.inject.threads import one_at_a_time, record_choice
from lorakin.inject.trainable_tokens import check_rows_distinct, paths_with_rows

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter


@one_at_a_time
def set_active(model: nn.Module, names: str | Sequence[str]) -> None:
    """Makes exactly these adapters the active ones. Several add up; `[]` leaves the base alone.

    No `requires_grad` changes.

    Raises:
        SettingError: an unknown name, or two adapters that both train the same module whole, its
            bias, or the same row.
        StateError: an adapter is merged.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    adapters = check_switchable(model, names)
    check_no_mixed_batch(model, "switched")
    chosen = [adapters[name] for name in names]
    _check_whole_modules_apart(chosen)
    check_rows_distinct({adapter.name: adapter.placement.tokens for adapter in chosen})
    check_biases_distinct(placements(chosen), SettingError)
    # It raises if two adapters have moved one buffer.
    registry_of(model).buffers.owners(model, chosen)

    for adapter in adapters.values():
        for path in adapter.tensors.paths():
            attached = attachments_at(model, path)
            attached.active = tuple(name for name in names if name in attached)
    registry_of(model).buffers.use(model, adapters)
    record_choice(model)


def _check_whole_modules_apart(adapters: Sequence[InsertedAdapter]) -> None:
    """Checks that no module that one of these adapters trains whole is another's, or holds one.

    Raises:
        SettingError: one is or does.
    """
    trained_by: dict[str, str] = {}
    for adapter in adapters:
        for path in adapter.placement.whole_modules:
            if path in trained_by:
                raise SettingError(
                    f"{trained_by[path]!r} and {adapter.name!r} both train {path} whole; activate "
                    "one of them"
                )
            trained_by[path] = adapter.name

    for adapter in adapters:
        placement = adapter.placement
        for path in (*placement.methods, *paths_with_rows(placement.tokens), *placement.biases):
            for whole_module, owner in trained_by.items():
                if owner != adapter.name and path.startswith(f"{whole_module}."):
                    raise SettingError(
                        f"{adapter.name!r} adapts {path}, inside {whole_module}, which {owner!r} "
                        "trains whole; activate one"
                    )


def check_switchable(model: nn.Module, names: Sequence[str]) -> Mapping[str, InsertedAdapter]:
    """Checks that the adapters of these names can be used instead of the active ones.

    Returns:
        all adapters in the model, by name.

    Raises:
        SettingError: an unknown name.
        StateError: an adapter is merged, or has moved the base weights in place.
    """
    adapters = registry_of(model).adapters
    for name in names:
        if name not in adapters:
            present = ", ".join(map(repr, adapters)) or NO_ADAPTERS
            raise SettingError(f"no adapter {name!r} in the model; there are: {present}")
    if merged := [name for name, adapter in adapters.items() if adapter.effect.is_merged]:
        raise StateError(f"adapter {merged[0]!r} is merged; unmerge it before switching")
    if len(adapters) > 1 or not names:
        check_base_in_place(adapters, "switching")
    return adapters
