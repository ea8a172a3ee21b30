"""Which of a model's adapters are in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from lorakin.errors import SettingError, StateError
from lorakin.inject.biases import check_biases_apart
from lorakin.inject.effect import check_base_in_place, check_no_mixed_batch, placements
from lorakin.inject.model_registry import NO_ADAPTERS, registry_of
from lorakin.inject.part import attachments_at
from lorakin.inject.threads import alone, chosen
from lorakin.inject.trainable_tokens import check_apart, places_of

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter


@alone
def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Use exactly these adapters in the forward. Several add up; `[]` leaves the base alone.

    No `requires_grad` changes.

    Raises:
        SettingError: an unknown name, or two adapters that both train the same module whole, its
            bias, or the same row.
        StateError: an adapter is merged.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    known = check_switchable(model, names)
    check_no_mixed_batch(model, "switched")
    replaced: dict[str, str] = {}
    for name in names:
        for path in known[name].placement.whole_modules:
            if path in replaced:
                raise SettingError(
                    f"{replaced[path]!r} and {name!r} both train {path} whole; activate one of them"
                )
            replaced[path] = name
    check_apart({name: known[name].placement.tokens for name in names})
    for name in names:
        placement = known[name].placement
        for path in (*placement.methods, *places_of(placement.tokens), *placement.biases):
            whole = next(
                (
                    copy
                    for copy in replaced
                    if path.startswith(copy + ".") and replaced[copy] != name
                ),
                None,
            )
            if whole:
                raise SettingError(
                    f"{name!r} adapts {path}, inside {whole}, which {replaced[whole]!r} trains "
                    f"whole; activate one"
                )
    check_biases_apart(placements([known[name] for name in names]), SettingError)
    registry_of(model).buffers.owners(model, [known[name] for name in names])
    for adapter in known.values():
        for path in adapter.tensors.paths():
            attached = attachments_at(model, path)
            attached.active = tuple(name for name in names if name in attached)
    registry_of(model).buffers.show(model, known)
    chosen(model)


def check_switchable(model: nn.Module, names: Sequence[str]) -> Mapping[str, InsertedAdapter]:
    """The adapters in `model`, if those of these names can be used instead of the active ones."""
    known = registry_of(model).adapters
    for name in names:
        if name not in known:
            raise SettingError(
                f"no adapter {name!r} in the model; there are: "
                f"{', '.join(map(repr, known)) or NO_ADAPTERS}"
            )
    if merged := [name for name, adapter in known.items() if adapter.effect.is_merged]:
        raise StateError(f"adapter {merged[0]!r} is merged; unmerge it before switching")
    if len(known) > 1 or not names:
        check_base_in_place(known, "switching")
    return known
