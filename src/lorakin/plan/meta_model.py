"""Makes a model on the meta device, without weights, from its config alone.

It tells everything that only shapes decide, such as how many parameters a method trains.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from lorakin.adapting import adapt
from lorakin.family import Method
from lorakin.inject import placement
from lorakin.inject.adapted import module_at
from lorakin.inject.layer_kinds import unadapted
from lorakin.inject.measuring import check_called
from lorakin.inject.targets import ALL_LINEAR, Targets
from lorakin.training import loading
from lorakin.training.models import config_of
from lorakin.training.precision import DTYPES, resolve_dtype


def meta_model_of(
    name: str,
    dtype: str = "auto",
    labels: Sequence[str] | None = None,
    auto: str | None = None,
) -> Any:
    """Returns the model of `load_model(name, dtype, labels)` on the meta device.

    Only the config is read; of a hub id only config.json is fetched.

    Args:
        name: a packaged model, a `.gguf` file, a directory or a hub id.
        dtype: "float32", "bfloat16", "float16", "base" or "auto", as for `load_model`.
        labels: the classes of a classifier, in order; None for a causal language model.
        auto: the name of the Auto class of the task, as for `load_model`.

    Raises:
        ModelError: there is no such model, or its config belongs to another kind of model.
        SettingError: an unknown dtype.
    """
    config = config_of(name, labels)
    chosen = resolve_dtype(dtype, classification=labels is not None)
    return meta_model(config, DTYPES.get(chosen), labels is not None, auto)


def meta_model(
    config: Any,
    dtype: torch.dtype | None = None,
    classifier: bool = False,
    auto: str | None = None,
) -> Any:
    """Returns the model of a transformers config on the meta device.

    >>> config = transformers.GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)
    >>> meta_model(config).lm_head.weight.device
    device(type='meta')

    Args:
        config: a transformers config.
        dtype: of the weights; None is the config's own.
        classifier: a classifier instead of a causal language model.
        auto: the name of another Auto class.

    Raises:
        ModelError: the config belongs to no such model.
    """
    usual = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    kinds = {
        "AutoModelForSequenceClassification": "classifier",
        "AutoModelForCausalLM": "causal language model",
    }
    chosen = auto or usual
    kind = kinds.get(chosen, chosen.removeprefix("AutoModelFor"))
    loads = getattr(transformers, chosen)
    what = f"{type(config).__name__} is not the config of a {kind}"
    with loading.as_model_error(what), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # initialisers find nothing to initialise
        return loading.model_from_config(
            loads,
            copy.deepcopy(config),
            dtype=dtype or config.dtype or torch.float32,
        )


def give_tensors(model: nn.Module) -> None:
    """Gives a meta model empty tensors on the CPU, with the same ties.

    Under `FakeTensorMode` they take no memory.
    """
    by_id: dict[int, torch.Tensor] = {}
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in holders:
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in by_id:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, tensor.requires_grad)
                    by_id[id(tensor)] = empty
                if tensor is not None:
                    tensors[name] = by_id[id(tensor)]


def trainable_parameters(
    model: nn.Module, method: Method, targets: Targets = ALL_LINEAR, **selection: Any
) -> int:
    """Returns how many parameters `method` trains in `model`, which is left as it was.

    >>> from lorakin.family import method_named
    >>> config = transformers.GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)
    >>> trainable_parameters(meta_model(config), method_named("lora", {"rank": 1}), "c_attn")
    16

    Args:
        model: a meta model or a real one.
        method: the method. If it chooses its modules by a probe, this counts the most that it can
            train (see `with_assumed_importance`).
        targets, selection: as for `lorakin.adapt`.

    Raises:
        LorakinError: the method cannot run on this model.
    """
    adapter = adapt(
        model,
        with_assumed_importance(model, method, targets, **selection),
        targets,
        name="counted",
        **selection,
    )
    try:
        return adapter.trainable_parameters
    finally:
        adapter.remove()


def with_assumed_importance(
    model: nn.Module, method: Method, targets: Targets = ALL_LINEAR, **selection: Any
) -> Method:
    """Returns `method` with the worst result that its probe, if it has one, could have.

    All modules are equally important, so that it takes the most modules to reach a share of the
    importance, and the largest modules come first.
    """
    if method.needed_probe is None:
        return method
    arguments: dict[str, Any] = {"layer_indices": selection.get("layers")} | {
        k: v for k, v in selection.items() if k in SAME_NAMES
    }
    paths = placement.choose_modules(model, method.for_probe(), targets, **arguments).methods
    check_called(model, paths)
    shapes = {path: unadapted(module_at(model, path)).shape for path in paths}
    ranked = sorted(shapes, key=lambda path: -(shapes[path].inputs + shapes[path].outputs))
    return method.with_importance(_almost_equal(ranked))


SAME_NAMES = {"exclude", "rank_pattern", "alpha_pattern", "modules_to_save", "rank_above"}
"""Arguments with the same name in `adapt` and in `placement.choose_modules`."""


def _almost_equal(ranked: Sequence[str]) -> Mapping[str, float]:
    """Returns shares that sum to 1 and fall by a hair, so that they have an order."""
    count = len(ranked)
    return {
        path: (1 + 1e-6 * ((count - 1) / 2 - position) / count) / count
        for position, path in enumerate(ranked)
    }
