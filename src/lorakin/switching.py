"""A model's adapters together: finding, activating and merging them, and mixed batches."""

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
    """Returns the adapters in `model`, by name (PEFT: `peft_config`).

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> adapter = lk.adapt(model, lk.LoRA(rank=1), name="french")
    >>> list(lk.adapters(model))
    ['french']
    """
    return {
        name: adapter
        for name, adapter in adapters_in(root_of(model)).items()
        if isinstance(adapter, Adapter)
    }


def merge(model: nn.Module, names: str | Sequence[str]) -> None:
    """Folds these adapters into the weights permanently, all at once; they leave the model.

    PEFT: `merge_and_unload`. For one adapter this is `adapter.merge(permanent=True)`. Several DoRAs
    must be merged together: each gain is over the base's weight, which merging one would change.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> one, two = (lk.adapt(model, lk.LoRA(rank=1), name=name) for name in ("one", "two"))
    >>> lk.merge(model, ["one", "two"])
    >>> type(model[0]), lk.adapters(model)
    (<class 'torch.nn.modules.linear.Linear'>, {})

    Raises:
        SettingError: an unknown name.
        StateError: a merged weight would not be finite, an adapter is disabled, another one is
            merged, two do not go together, or one that stays has a gain over a weight that would
            change. Then nothing is merged.
    """
    merge_for_good(root_of(model), names)


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Makes exactly these adapters the active ones. Several add up; `[]` leaves the base alone.

    No `requires_grad` changes. PEFT: `set_adapter`.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> one, two = (lk.adapt(model, lk.LoRA(rank=1), name=name) for name in ("one", "two"))
    >>> lk.activate(model, "one")
    >>> one.is_active, two.is_active
    (True, False)

    Raises:
        SettingError: an unknown name, or two adapters that both train the same module whole or
            its bias.
        StateError: an adapter is merged.
    """
    set_active(root_of(model), names)


def mixed_batch(
    model: nn.Module, names: Iterable[str | None]
) -> contextlib.AbstractContextManager[None]:
    """Lets each row of a batch use another adapter, inside a `with` block.

    PEFT: the argument `adapter_names` of a forward.

    In `with mixed_batch(model, ["a", None, "b"]): model(…)` row n uses the adapter `names[n]`
    alone; None is the base. It works in `generate` too: in a batch of k times as many rows, as
    beams make, each name counts for k rows. Adapters of different methods can be mixed.

    In inference the adapters' tensors are read at the first call, so do not change them inside the
    block. Blocks nest, in one thread at a time. For training, the backward pass must be inside too.
    Modules must have the batch as their first dimension.

    >>> import lorakin as lk
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> one, two = (lk.adapt(model, lk.LoRA(rank=1), name=name) for name in ("one", "two"))
    >>> import torch
    >>> with torch.no_grad(), lk.mixed_batch(model, ["one", None, "two"]):
    ...     model(torch.ones(3, 3)).shape
    torch.Size([3, 2])

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
