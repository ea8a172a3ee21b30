"""The adapters of a model together: which there are, which are in use, merging several, mixed batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

from torch import nn

from lorakin.adapter import Adapter
from lorakin.inject.activation import activate as use
from lorakin.inject.merging import merge as merge_for_good
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
    """Fold these adapters into the weights for good, all at once, as if all were in use; they leave the model.

    `adapter.merge(permanent=True)` is this for one adapter. Several DoRAs go together only like this: each of their gains is
    over the base's own weight, and the first one merged would change that for the next.

    Raises:
        SettingError: an unknown name.
        StateError: a merged weight would not be finite, an adapter is disabled, another one is merged, two do not go together,
            or one that stays has a gain over a weight that would change. Nothing is merged then.
    """
    merge_for_good(root_of(model), names)


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Use exactly these adapters; several add up, `[]` leaves the base alone. Changes no `requires_grad`.

    Raises:
        SettingError: an unknown name, or two adapters that both train the same module whole, or its bias.
        StateError: an adapter is merged.
    """
    use(root_of(model), names)


def mixed_batch(
    model: nn.Module, names: Iterable[str | None]
) -> contextlib.AbstractContextManager[None]:
    """`with mixed_batch(model, ["a", None, "b"]): model(…)`: row n uses the adapter `names[n]` alone, None being the base.

    Also in `generate`: a batch of k times as many rows, as beams make, takes each name k times in a row. Any method's adapters
    go together. For inference the pairs of a linear layer are stacked when it is first called, and kept while nothing in them
    trains: do not change their tensors inside. Contexts nest, and one may be entered again; one thread at a time. Training
    works too, if the backward pass is inside. Modules must have the batch as their first dimension.

    Args:
        model: holds the adapters, none of them merged.
        names: one for each row of the batch.

    Raises:
        SettingError: an unknown name; in the forward, a batch whose rows are no multiple of the names.
        StateError: an adapter is merged or has moved the base weights, or another thread is in such a context; inside, adding,
            removing, merging or switching adapters; in the forward, a module whose rows are not the batch's.
    """
    return MixedBatch(root_of(model), names)
