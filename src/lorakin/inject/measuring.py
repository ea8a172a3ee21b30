"""Measuring modules on data: their inputs, and the gradients of the loss by their weights.

Hooks watch the modules while batches run through the model, in eval mode; nothing is changed. Three
use what they see: a member's `Collector` (EVA, LoRA-GA), `calibration_inputs.py`, and
`activation_norms.py` (LoRA-drop).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import SettingError
from lorakin.family import INPUTS, Collector
from lorakin.family.precision import wide_dtype
from lorakin.inject.adapted import module_at
from lorakin.inject.callers import first_argument
from lorakin.inject.layer_kinds import (
    ExpertLayer,
    LinearLayer,
    QuantisedLayer,
    TransposedLayer,
    kind_of,
)
from lorakin.inject.module_mode import in_mode

Loss = Callable[[Any, Any], Any]
"""(model, batch) → the loss; it runs the model. To measure inputs, any result will do."""
Input = Callable[[str, nn.Module, Tensor, Tensor | None], None]
"""Is called with (path, module, input, attention mask or None) at each call of a module."""
LINEAR = (LinearLayer, QuantisedLayer, TransposedLayer)


def measure(
    model: nn.Module,
    paths: Sequence[str],
    collector: Collector,
    of: str,
    batches: Sequence[Any],
    loss: Loss | None = None,
    max_batches: int | None = None,
) -> None:
    """Shows a collector the inputs or the gradients of linear modules on batches of data.

    Inputs are measured until the collector says that it has seen enough: on the batches once, or on
    `max_batches`, for which they are run again if there are fewer. For gradients they are run once.

    Args:
        model: as it is, adapters in use included; nothing in it changes.
        paths: the modules' paths.
        collector: is given what is measured.
        of: `INPUTS` or `GRADIENTS`.
        batches: mappings that the model takes; an `attention_mask` (batch, length) says what is
            padding.
        loss: runs the model on a batch. By default the batch's entries are the model's arguments,
            and the loss is the output's.
        max_batches: how many batches to run at most.

    Raises:
        SettingError: a module that cannot be measured, no batches, or no loss to take gradients of.
    """
    check_called(model, paths)
    check_linear(model, paths)
    if not batches:
        raise SettingError("there are no batches to measure on; give at least one")
    for number, batch in enumerate(batches):
        if loss is None and not isinstance(batch, Mapping):
            raise SettingError(
                f"batch {number} to measure on is a {type(batch).__name__}, not a mapping that the "
                "model takes as keywords; or give loss="
            )
    if of == INPUTS:
        with watching(model, paths, _to_collector(collector)) as begin, torch.no_grad():
            limit = len(batches) if max_batches is None else max_batches
            for batch in itertools.islice(itertools.cycle(batches), limit):
                begin(batch)
                _run(model, batch, loss)
                if collector.end_batch():
                    return
    else:
        with gradients_to(model, paths, collector):
            for batch in itertools.islice(batches, max_batches):
                value = _loss(model, batch) if loss is None else loss(model, batch)
                _checked(value).backward()  # type: ignore[no-untyped-call]
                if collector.end_batch():
                    return


def inputs_of(
    model: nn.Module,
    paths: Sequence[str],
    batches: Iterable[Any],
    see: Input,
    loss: Loss | None = None,
) -> None:
    """Calls `see` with every input of these modules while the batches run through the model."""
    with watching(model, paths, see) as begin, torch.no_grad():
        for batch in batches:
            begin(batch)
            _run(model, batch, loss)


@contextlib.contextmanager
def watching(model: nn.Module, paths: Sequence[str], see: Input) -> Iterator[Callable[[Any], None]]:
    """Calls `see` with every input of these modules inside a `with` block, in eval mode.

    Yields `begin(batch)`. Call it before each forward, so that padding is known.
    """
    mask: Tensor | None = None

    def begin(batch: Any) -> None:
        nonlocal mask
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(path, module, first_argument(args, kwargs), mask)

        return hook

    modules = {path: model.get_submodule(path) for path in paths}
    hooks = [m.register_forward_pre_hook(before(p), with_kwargs=True) for p, m in modules.items()]
    try:
        with in_mode(model, training=False):
            yield begin
    finally:
        for handle in hooks:
            handle.remove()


@contextlib.contextmanager
def gradients_to(model: nn.Module, paths: Sequence[str], collector: Collector) -> Iterator[None]:
    """Shows the collector the gradients by the weights in each backward of a `with` block."""

    def after(path: str) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
        ) -> None:
            # The base is frozen, so nothing before may have asked for a gradient.
            if not out.requires_grad:
                out.requires_grad_(True)
            if collector.wants(path):
                x = first_argument(args, kwargs)
                out.register_hook(lambda grad: collector.add(path, _weight_gradient(grad, x)))  # type: ignore[no-untyped-call]

        return hook

    modules = {path: model.get_submodule(path) for path in paths}
    hooks = [m.register_forward_hook(after(p), with_kwargs=True) for p, m in modules.items()]
    trained = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    for parameter, _ in trained:
        parameter.grad = None
    try:
        with in_mode(model, training=False), torch.enable_grad():
            yield
    finally:
        for handle in hooks:
            handle.remove()
        for parameter, grad in trained:
            parameter.grad = grad


def check_called(model: nn.Module, paths: Iterable[str]) -> None:
    """Raises `SettingError` if one of these modules is never called by itself."""
    if experts := [path for path in paths if kind_of(module_at(model, path)) is ExpertLayer]:
        raise SettingError(
            f"each module is to be measured, and {experts[0]}, one expert of a stack or another "
            "parameter, is never called by itself; leave these out of the targets"
        )


def check_linear(model: nn.Module, paths: Iterable[str]) -> None:
    """Raises `SettingError` if one of these modules is not a linear layer."""
    if others := [path for path in paths if kind_of(module_at(model, path)) not in LINEAR]:
        raise SettingError(
            f"{others[0]} is not a linear layer, and only inputs and gradients of linear layers "
            "can be measured; leave it out of the targets"
        )


def unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the tokens (n, inputs) of an input (…, inputs) that `mask` (batch, length) leaves."""
    tokens = x.reshape(-1, x.shape[-1])
    if mask is not None and mask.dim() == 2 and mask.numel() == len(tokens):
        tokens = tokens[mask.reshape(-1).bool().to(x.device)]
    return tokens


def _to_collector(collector: Collector) -> Input:
    """Returns a callback that gives a collector each input without padding.

    Modules that are called in a row with one tensor give it one object.
    """
    last: list[tuple[Tensor, Tensor]] = []

    def see(path: str, module: nn.Module, x: Tensor, mask: Tensor | None) -> None:
        if not collector.wants(path):
            return
        if not last or last[0][0] is not x:
            last[:] = [(x, _wide(unpadded(x.detach(), mask)))]
        collector.add(path, last[0][1])

    return see


def _run(model: nn.Module, batch: Any, loss: Loss | None) -> None:
    if loss is None:
        model(**batch)
    else:
        loss(model, batch)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise SettingError(
            "gradients are measured of the loss on batches, which must be mappings with labels, so "
            "that the model's output has a loss; or give loss="
        )
    loss: Tensor = model(**batch).loss
    return loss


def _checked(loss: Any) -> Tensor:
    """Returns the loss, if gradients can be taken of it; else raises `SettingError`."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise SettingError(
            "gradients are measured of the loss, a tensor of one number with a gradient, not "
            f"{loss!r}"
        )
    return loss


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Returns a weight's gradient (outputs, inputs): that of a call's outputs times its inputs."""
    outer, inner = (_wide(t.detach().reshape(-1, t.shape[-1])) for t in (grad, x))
    return outer.T @ inner


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor.dtype))
