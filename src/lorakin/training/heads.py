"""What a base's files say against the model: other classes, other shapes, unused weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lorakin.errors import LorakinWarning, ModelError, some
from lorakin.inject.heads import head_of

BUFFERS = re.compile(
    r"(^|\.)(inv_freq|position_ids|token_type_ids|masked_bias|causal_mask|(attn|attention)\.bias|num_batches_tracked"
    r"|relative_position_index|embed_positions\.weights?|version)$"
)
"""Buffers that earlier versions of transformers stored and that models compute now."""
NAMELESS = re.compile(r"LABEL_\d+")
NEW = "so the head is new and must be trained"


def check_unused(
    name: str,
    model: nn.Module,
    unused: Iterable[str],
    stored: Sequence[str],
    quantised: bool = False,
) -> None:
    """Refuses weights in the base's files that belong inside the model and that it does not use.

    A weight is inside if the model has the module that holds it or, in the model's base, the list
    of layers that its layer is missing from: then the model computes something else than what was
    stored. A weight for which the model has no place at all, such as a head, is usual if the model
    is loaded as another class; if it is the same class, a warning names it. Files that are stored
    quantised hold remains of their formats (GPTQ's zero biases): a warning names those, too.

    Args:
        name: what the user called the model.
        model: the model.
        unused: the keys of the weights.
        stored: the classes that the base's config names.
        quantised: whether its files are stored quantised.

    Raises:
        ModelError: weights inside the model are not used.
    """
    left = sorted(key for key in unused if not BUFFERS.search(key))
    base = getattr(model, "base_model", model)
    within = {module for module in base.modules() if module is not base and module is not model}
    homes = within | {
        module for module in model.modules() if any(True for _ in module.parameters(recurse=False))
    }
    inside = [key for key in left if _nearest(model, key) in homes - {base, model}]
    if inside and not quantised:
        raise ModelError(
            f"model {name!r} holds {some(inside)}, which a {type(model).__name__} of its config "
            "does not use, so it would not be the model that was stored. An adapter or a "
            "quantisation that was saved with it, or fewer layers in its config? Save the model "
            "without them"
        )
    if left and (inside or type(model).__name__ in stored):
        warnings.warn(
            f"model {name!r} holds weights that a {type(model).__name__} does not use, and they "
            f"are left out: {some(left)}",
            LorakinWarning,
            stacklevel=4,
        )


def _nearest(model: nn.Module, key: str) -> nn.Module:
    """Returns the module that would hold `key`: as far down its path as there are modules."""
    module = model
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if key.partition(".")[0] not in dict(model.named_children()) and hasattr(model, prefix[:-1]):
        key = prefix + key
    for part in key.split(".")[:-1]:
        child = dict(module.named_children()).get(part)
        if child is None:
            break
        module = child
    return module


def check_shapes(
    name: str, model: nn.Module, mismatched: Iterable[Sequence[Any]], heads: Sequence[str]
) -> list[str]:
    """Returns the parameters that are stored in another shape, which must all be in `heads`.

    Args:
        name: what the user called the model.
        model: the model.
        mismatched: for each such parameter its key, the stored and the expected shape.
        heads: the paths of modules that may be new.

    Raises:
        ModelError: one is elsewhere, where no number of classes explains it.
    """
    keys = []
    for key, stored, expected in sorted(mismatched, key=str):
        if not any(key.startswith(f"{head}.") for head in heads):
            raise ModelError(
                f"model {name!r} stores {key} as {tuple(stored)}, and its config makes a "
                f"{type(model).__name__} in which it is {tuple(expected)}; are both of one model?"
            )
        keys.append(key)
    return keys


def named_classes(config: Any, head: str = "ForSequenceClassification") -> list[str] | None:
    """Returns the classes of a model stored with such a head, in order; None for others."""
    if not any(str(kind).endswith(head) for kind in getattr(config, "architectures", None) or ()):
        return None
    return [str(config.id2label[number]) for number in sorted(config.id2label)]


def fit(
    model: nn.Module, stored: Sequence[str] | None, wanted: Sequence[str], mismatched: Sequence[str]
) -> str | None:
    """Makes the head of a stored classifier fit the wanted classes.

    It is kept, its rows are put in another order, or it is drawn again.

    Args:
        model: the classifier.
        stored: the classes that the base's files name, or None if they are not a classifier's.
        wanted: the classes of the data.
        mismatched: parameters of the head that are new already, for their stored shape differs.

    Returns:
        What was done, for the user; None if the head is as it was stored.
    """
    if stored is None:
        return None
    of_base, of_data = f"{len(stored)} classes ({some(stored)})", f"{len(wanted)} ({some(wanted)})"
    if mismatched:
        return f"the base's head is for {of_base}, the data has {of_data}, {NEW}"
    if list(stored) == list(wanted) or all(NAMELESS.fullmatch(name) for name in stored):
        return None
    if set(stored) == set(wanted) and len(set(wanted)) == len(wanted):
        _reorder(model, torch.tensor([list(stored).index(name) for name in wanted]))
        return (
            f"the base's head has its classes in another order ({some(stored)}); "
            f"it is put into the data's ({some(wanted)})"
        )
    _renew(model)
    return f"the base's head is for other classes ({some(stored)}), the data has {of_data}, {NEW}"


def _reorder(model: Any, order: torch.Tensor) -> None:
    """Puts the rows of the head's last layer into this order."""
    layers = [model.get_submodule(path) for path in head_of(model)]
    last = next(
        layer for layer in reversed(layers) if getattr(layer, "out_features", None) == len(order)
    )
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.copy_(parameter[order.to(parameter.device)])


def _renew(model: Any) -> None:
    """Draws the head again, as transformers does if it is missing."""
    for path in head_of(model):
        module = model.get_submodule(path)
        for inner in module.modules():
            for parameter in inner.parameters(recurse=False):
                parameter._is_hf_initialized = False
            inner._is_hf_initialized = False
            model._init_weights(inner)
