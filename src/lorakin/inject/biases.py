"""Biases that an adapter trains: those of the modules it adapts, or all of the model's.

An adapter has its own value of each, which starts as the base's and is attached beside its other
tensors. The base's stays in place, so code that saves, moves or counts the base sees that. A
forward sees the adapter's while the adapter is in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakin.errors import SettingError, StateError
from lorakin.family.precision import wide_dtype
from lorakin.family.sharding import is_sharded
from lorakin.inject.attachments import BIAS, attachments_or_none
from lorakin.inject.branch import offloaded_tensors_loaded
from lorakin.inject.experts import ExpertMatrix
from lorakin.inject.targets import named_modules
from lorakin.kernels.autograd import PLAIN_TYPES

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter
    from lorakin.inject.placement import Placement

NO_BIASES, ADAPTED, ALL = "none", "lora_only", "all"
"""The words for the biases of no module, of the adapted ones, and of all; PEFT's `bias`."""


def find_biases(
    model: nn.Module, which: str, adapted_paths: Iterable[str], whole_modules: Sequence[str]
) -> tuple[str, ...]:
    """Returns the paths of the modules whose bias an adapter trains.

    Args:
        model: the base.
        which: "none"; "lora_only", the biases of the adapted modules; or "all", those of the model.
        adapted_paths: the paths that the adapter is on.
        whole_modules: the paths of modules that it trains whole.

    Raises:
        SettingError: another word, or a model without such biases.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> find_biases(model, "lora_only", ["0"], []), find_biases(model, "all", ["0"], [])
    (('0',), ('0', '1'))
    """
    if which not in (NO_BIASES, ADAPTED, ALL):
        raise SettingError(f"bias must be one of {NO_BIASES}, {ADAPTED} and {ALL}, not {which!r}")
    if which == NO_BIASES:
        return ()
    skip, adapted = (
        tuple(f"{path}." for path in whole_modules),
        adapted_modules(model, adapted_paths),
    )
    biased = []
    for path, module in named_modules(model).items():
        selected = path in adapted if which == ADAPTED else not f"{path}.".startswith(skip)
        if selected and not isinstance(module, ExpertMatrix) and base_bias(module) is not None:
            biased.append(path)
    if not biased:
        where = "of the modules it adapts has" if which == ADAPTED else "module has"
        raise SettingError(f"bias={which!r} would train nothing: none {where} a bias; leave it out")
    return tuple(biased)


def adapted_modules(model: nn.Module, adapted_paths: Iterable[str]) -> set[str]:
    """Returns the paths of the modules at `adapted_paths`; for a parameter, that of its owner."""
    owners = set()
    for path in adapted_paths:
        try:
            model.get_submodule(path)
        except AttributeError:
            path = path.rsplit(".", 2)[0]
        owners.add(path)
    return owners


def base_bias(module: nn.Module) -> Tensor | None:
    """Returns the base's bias of a module, whatever adapters do; None if there is none."""
    attached = attachments_or_none(module)
    bias: Tensor | None = module._parameters.get(BIAS)
    if attached is not None and bias is not None:
        bias = attached.base_before_merge.get(BIAS, bias)
    return bias if bias is not None and bias.is_floating_point() else None


def initial_biases(
    model: nn.Module, paths: Sequence[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns the initial biases of an adapter: the base's, in `dtype`, or float32 at least.

    Biases that are one parameter in the base are one tensor.

    Raises:
        StateError: the base is sharded already.
    """
    copies: dict[int, Tensor] = {}
    initial = {}
    for path in paths:
        bias = base_bias(model.get_submodule(path))
        assert bias is not None
        if is_sharded(bias):
            raise StateError(
                f"the bias of {path} is sharded already, so an adapter cannot start from it; adapt "
                "the model before it is sharded, or leave bias out"
            )
        if id(bias) not in copies:
            wide = dtype or wide_dtype(bias.dtype)
            copies[id(bias)] = bias.detach().to(wide, copy=True)
        initial[path] = copies[id(bias)]
    return initial


def cast_like_base(child: Any, module: Any) -> Tensor:
    """Returns the bias of an adapter's `child` with the device and dtype of the base's."""
    bias: Tensor = child._parameters[BIAS]
    original, weight = module._parameters[BIAS], module._parameters.get("weight")
    if original.is_meta:
        return bias
    if bias.is_meta:
        # Accelerate has offloaded it.
        with offloaded_tensors_loaded([child]):
            bias = child._parameters[BIAS].clone()
    bias = bias.to(original.device, original.dtype)
    # bitsandbytes casts `bias.data` in place: give it a view.
    return bias if type(weight) in PLAIN_TYPES else bias.view_as(bias)


def check_biases_distinct(
    placements: Mapping[str, Placement], error: type[SettingError | StateError]
) -> None:
    """Checks that no two of these adapters, given by name, train the bias of one module.

    Raises:
        error: two do.
    """
    owners: dict[str, str] = {}
    for name, placement in placements.items():
        for path in placement.biases:
            if path in owners:
                raise error(
                    f"{owners[path]!r} and {name!r} both train the bias of {path}; use one of them "
                    "at a time"
                )
            owners[path] = name


def share_merged_biases(model: nn.Module, adapter: InsertedAdapter) -> None:
    """Lets merged modules share a bias that they share in the adapter and in the base."""
    first: dict[int, Any] = {}
    for path, bias in adapter.tensors.biases().items():
        module = model.get_submodule(path)
        module._parameters[BIAS] = first.setdefault(id(bias), module._parameters[BIAS])
