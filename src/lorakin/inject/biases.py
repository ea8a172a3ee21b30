"""Biases that an adapter trains: those of the modules it adapts, or all of the model's.

An adapter has its own of each, which starts as the base's and hangs beside its other tensors. The
base's stays where it is, so whatever saves, moves or counts the base sees that. A forward sees the
adapter's while the adapter is in use.
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

NONE, ADAPTED, ALL = "none", "lora_only", "all"


def find_biases(
    model: nn.Module, which: str, branches: Iterable[str], whole: Sequence[str]
) -> tuple[str, ...]:
    """Returns the paths of the modules whose bias an adapter trains.

    Args:
        model: the base.
        which: "none"; "lora_only", the biases of the adapted modules; or "all", those of the model.
        branches: the paths that the adapter is on.
        whole: the paths of modules that it trains whole.

    Raises:
        SettingError: another word, or a model without such biases.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> find_biases(model, "lora_only", ["0"], []), find_biases(model, "all", ["0"], [])
    (('0',), ('0', '1'))
    """
    if which not in (NONE, ADAPTED, ALL):
        raise SettingError(f"bias must be one of {NONE}, {ADAPTED} and {ALL}, not {which!r}")
    if which == NONE:
        return ()
    skip, adapted = tuple(f"{path}." for path in whole), adapted_modules(model, branches)
    found = []
    for path, module in named_modules(model).items():
        wanted = path in adapted if which == ADAPTED else not f"{path}.".startswith(skip)
        if wanted and not isinstance(module, ExpertMatrix) and base_bias(module) is not None:
            found.append(path)
    if not found:
        where = "of the modules it adapts has" if which == ADAPTED else "module has"
        raise SettingError(f"bias={which!r} would train nothing: none {where} a bias; leave it out")
    return tuple(found)


def adapted_modules(model: nn.Module, branches: Iterable[str]) -> set[str]:
    """Returns the paths of the modules at `branches`; for a parameter, that of its owner."""
    found = set()
    for path in branches:
        try:
            model.get_submodule(path)
        except AttributeError:
            path = path.rsplit(".", 2)[0]
        found.add(path)
    return found


def base_bias(module: nn.Module) -> Tensor | None:
    """Returns the base's own bias of a module, whatever adapters do; None if there is none."""
    attached = attachments_or_none(module)
    own: Tensor | None = module._parameters.get(BIAS)
    if attached is not None and own is not None:
        own = attached.base_before_merge.get(BIAS, own)
    return own if own is not None and own.is_floating_point() else None


def initial_biases(
    model: nn.Module, paths: Sequence[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns an adapter's biases at the start: the base's, in `dtype`, or float32 at least.

    Biases that are one parameter in the base are one tensor.

    Raises:
        StateError: the base is sharded already.
    """
    made: dict[int, Tensor] = {}
    started = {}
    for path in paths:
        own = base_bias(model.get_submodule(path))
        assert own is not None
        if is_sharded(own):
            raise StateError(
                f"the bias of {path} is sharded already, so an adapter cannot start from it; adapt "
                "the model before it is sharded, or leave bias out"
            )
        if id(own) not in made:
            made[id(own)] = own.detach().to(dtype or wide_dtype(own.dtype), copy=True)
        started[path] = made[id(own)]
    return started


def cast_like_base(child: Any, module: Any) -> Tensor:
    """Returns the bias of an adapter's `child` with the device and dtype of the module's own."""
    bias: Tensor = child._parameters[BIAS]
    own, weight = module._parameters[BIAS], module._parameters.get("weight")
    if own.is_meta:
        return bias
    if bias.is_meta:  # Accelerate keeps it elsewhere
        with offloaded_tensors_loaded([child]):
            bias = child._parameters[BIAS].clone()
    bias = bias.to(own.device, own.dtype)
    # bitsandbytes casts the data of what it gets here, for good
    return bias if type(weight) in PLAIN_TYPES else bias.view_as(bias)


def check_biases_apart(
    placements: Mapping[str, Placement], error: type[SettingError | StateError]
) -> None:
    """Checks that no two of these adapters, given by name, have a bias of their own in one module.

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


def tie_merged(model: nn.Module, adapter: InsertedAdapter) -> None:
    """Lets merged modules share a bias that is one in the adapter and in the base."""
    first: dict[int, Any] = {}
    for path, own in adapter.tensors.biases().items():
        module = model.get_submodule(path)
        module._parameters[BIAS] = first.setdefault(id(own), module._parameters[BIAS])
