"""The adapters of a model together: which there are, which are in use, merging, mixed batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from torch import nn

from lorakin.adapter import Adapter
from lorakin.inject.active_adapters import set_active
from lorakin.inject.merging import merge_for_good
from lorakin.inject.mixed_batch import MixedBatch
from lorakin.inject.model_registry import adapters_in, root_of


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in `model`, by name."""
    return {
        name: adapter
        for name, adapter in adapters_in(root_of(model)).items()
        if isinstance(adapter, Adapter)
    }


def merge(model: nn.Module, names: str | Sequence[str]) -> None:
    """Fold these adapters into the weights for good, all at once; they leave the model.

    For one adapter this is `adapter.merge(permanent=True)`. Several DoRAs can only go together:
    each gain is over the base's own weight, which merging the first one would change.

    Raises:
        SettingError: an unknown name.
        StateError: a merged weight would not be finite, an adapter is disabled, another one is
            merged, two do not go together, or one that stays has a gain over a weight that would
            change. Then nothing is merged.
    """
    merge_for_good(root_of(model), names)


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Use exactly these adapters. Several add up; `[]` leaves the base alone.

    No `requires_grad` changes. PEFT calls this `set_adapter`.

    Raises:
        SettingError: an unknown name, or two adapters that both train the same module whole or
            its bias.
        StateError: an adapter is merged.
    """
    set_active(root_of(model), names)


def mixed_batch(
    model: nn.Module, names: Iterable[str | None]
) -> contextlib.AbstractContextManager[None]:
    """Let each row of a batch use an adapter of its own, inside a `with` block.

    In `with mixed_batch(model, ["a", None, "b"]): model(…)` row n uses the adapter `names[n]`
    alone; None is the base. It works in `generate` too: in a batch of k times as many rows, as
    beams make, each name counts for k rows. Adapters of different methods go together.

    For inference the pairs of a linear layer are stacked at its first call and kept, so do not
    change their tensors inside. Blocks nest, in one thread at a time. For training, the backward
    pass must be inside too. Modules must have the batch as their first dimension.

    Args:
        model: holds the adapters, none of them merged.
        names: one for each row of the batch.

    Raises:
        SettingError: an unknown name; in the forward, a batch whose rows are no multiple of the
            names.
        StateError: an adapter is merged or has moved the base weights, or another thread is in
            such a block. Inside: adapters are added, removed, merged or switched; in the forward,
            a module's rows are not the batch's.
    """
    return MixedBatch(root_of(model), names)
