"""A model without its weights: made from its config alone, for whatever only shapes decide."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from lorakin.adapter import adapt
from lorakin.family import Method
from lorakin.inject import placement
from lorakin.inject.adapted import module_at
from lorakin.inject.measuring import check_called
from lorakin.inject.targets import ALL_LINEAR, Targets
from lorakin.training import loading
from lorakin.training.models import config_of
from lorakin.training.precision import DTYPES, resolve_dtype


def skeleton(name: str, dtype: str = "auto", labels: Sequence[str] | None = None) -> Any:
    """The model that `load_model(name, dtype, labels)` would load, on the meta device; nothing but its config is read.

    Args:
        name: a packaged model, a `.gguf` file, a local directory, or a hub id, of which config.json alone is fetched.
        dtype: "float32", "bfloat16", "float16", "base", or "auto", as in `load_model`.
        labels: the classes, in order: a classifier instead of a causal language model.

    Raises:
        ModelError: nothing of that name, or its config is of no such model.
        SettingError: an unknown dtype.
    """
    config = config_of(name, labels)
    chosen = resolve_dtype(dtype, classification=labels is not None)
    return built(config, DTYPES.get(chosen), labels is not None)


def built(config: Any, dtype: torch.dtype | None = None, classifier: bool = False) -> Any:
    """The model of a transformers config on the meta device, in `dtype` or else the config's own.

    Raises:
        ModelError: the config is of no causal language model, or of no classifier.
    """
    auto = (
        transformers.AutoModelForSequenceClassification
        if classifier
        else transformers.AutoModelForCausalLM
    )
    what = f"{type(config).__name__} is the config of no {'classifier' if classifier else 'causal language model'}"
    with loading.readable(what), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # such as initialisers that find nothing to initialise
        return loading.made(
            auto, copy.deepcopy(config), dtype=dtype or config.dtype or torch.float32
        )


def give_tensors(model: nn.Module) -> None:
    """Give a skeleton empty tensors on the CPU, with the same ties; under `FakeTensorMode` they take no memory."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in holders:
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trains = tensor.requires_grad
                    made[id(tensor)] = (
                        nn.Parameter(empty, trains) if isinstance(tensor, nn.Parameter) else empty
                    )
                if tensor is not None:
                    tensors[name] = made[id(tensor)]


def trainable_parameters(
    model: nn.Module, method: Method, targets: Targets = ALL_LINEAR, **where: Any
) -> int:
    """How many numbers `method` would train in `model`, a skeleton or a real model, which is left as it was.

    `targets` and `where` are what `lorakin.adapt` takes. A method that chooses its modules by a probe is counted as
    `supposed` says, from above.

    Raises:
        LorakinError: whatever `adapt` raises.
    """
    adapter = adapt(
        model, supposed(model, method, targets, **where), targets, name="counted", **where
    )
    try:
        return adapter.trainable_parameters
    finally:
        adapter.remove()


def supposed(
    model: nn.Module, method: Method, targets: Targets = ALL_LINEAR, **where: Any
) -> Method:
    """`method` with what its probe, if it needs one, would find in the worst case.

    All modules are equally important, so that as many as ever are needed for a share of the whole, and the largest are
    chosen first.
    """
    if method.probe is None:
        return method
    places: dict[str, Any] = {"layer_indices": where.get("layers")} | {
        k: v for k, v in where.items() if k in PLACES
    }
    paths = placement.place(model, method.for_probe(), targets, **places).methods
    check_called(model, paths)
    shapes = {path: placement.target_of(module_at(model, path)).shape for path in paths}
    ranked = sorted(shapes, key=lambda path: -(shapes[path].inputs + shapes[path].outputs))
    return method.with_importance(_almost_equal(ranked))


PLACES = {"exclude", "rank_pattern", "alpha_pattern", "modules_to_save", "rank_above"}
"""What `adapt` and `placement.placement` call by the same names."""


def _almost_equal(ranked: Sequence[str]) -> Mapping[str, float]:
    """Shares that sum to 1, falling by a hair, so that an order is in them."""
    count = len(ranked)
    return {
        path: (1 + 1e-6 * ((count - 1) / 2 - place) / count) / count
        for place, path in enumerate(ranked)
    }
