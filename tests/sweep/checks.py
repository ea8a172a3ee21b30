"""What is asked of lorakin on one architecture, measured: `examined` gives the figures, tests and the table judge them."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lorakin as lk
from conftest import randomise
from lorakin.inject.heads import new_heads
from sweep import architectures
from sweep.inputs import loss_of, tensors

STEPS = 3
SCALE = 0.03
"""Of the adapter's random tensors: a little, since some of these random models magnify what they are given a hundredfold."""
EXACT = 1e-4
"""Furthest that a merged output may be from the unmerged one in float32."""
SAME = 1e-5
"""Furthest that a loaded adapter's output may be: it takes another path, since it does not train."""
MOVED = 1e-4
"""Least that an adapter of random tensors must move the output, for the rest to say something."""
LEFT_OUT = re.compile(r"(\S+) is left out: it is (.*)", re.DOTALL)


@dataclasses.dataclass
class Found:
    """One architecture's figures. Distances are relative to the largest absolute value of the output compared.

    `refused` maps modules (a layer's number as `*`) to reasons; under "" stands why the whole model was refused.
    `ungiven` are adapter tensors that never got a gradient, `unmoved` modules whose gradients were all zero, both without
    `unused`: modules whose base weight gets no gradient either, where the whole base trains.
    """

    name: str
    model: str
    adapted: int = 0
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    unused: list[str] = dataclasses.field(default_factory=list)
    ungiven: list[str] = dataclasses.field(default_factory=list)
    unmoved: list[str] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    moved: float = 0.0
    unlike_itself: float = 0.0
    merged: float = 0.0
    unmerged: float = 0.0
    loaded: float = 0.0
    changed: list[str] = dataclasses.field(default_factory=list)
    removed: float = 0.0


def examined(name: str) -> Found:
    """Train, merge, save, load and remove a LoRA adapter on the architecture; raises what lorakin or the model raises."""
    model = architectures.build(name)
    given = architectures.inputs(model, name)
    plain, twin = copy.deepcopy(model), copy.deepcopy(model)
    reached = _reached(plain, given)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    base = outputs(model, given)
    warnings.filterwarnings(
        "ignore", "the first step of adapter", lk.LorakinWarning
    )  # `unused` tells them
    found = Found(name, type(model).__name__, unlike_itself=distance(base, outputs(model, given)))
    adapter = _adapted(model, found)
    if adapter is None:
        return found
    found.adapted = len(adapter.placement.methods)
    found.unused = [path for path in adapter.placement.methods if not reached.get(path, True)]
    _train(model, adapter, given, found)
    randomise(adapter, SCALE)
    changed = outputs(model, given)
    found.moved = distance(base, changed)
    adapter.merge()
    found.merged = distance(changed, outputs(model, given))
    adapter.unmerge()
    found.unmerged = distance(changed, outputs(model, given))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training changed buffers", lk.LorakinWarning)
        lk.load(twin, adapter.save(folder))
        found.loaded = distance(changed, outputs(twin, given))
    adapter.remove()
    after = model.state_dict()
    found.changed = sorted(
        key for key in before.keys() | after.keys() if not _same(before.get(key), after.get(key))
    )
    found.removed = distance(base, outputs(model, given))
    return found


def seeded(seed: int) -> None:
    """Seed everything that transformers' models draw from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def loss(model: nn.Module, given: dict[str, Any], seed: int) -> Tensor:
    """The loss of one forward in train mode, with dropout and masking drawn from `seed`."""
    seeded(seed)
    return loss_of(model.train()(**copy.deepcopy(given)))


def outputs(model: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    """Every floating tensor of the output in eval mode, always with the same seed: some models draw there too."""
    seeded(0)
    with torch.no_grad():
        out = model.eval()(**copy.deepcopy(given))
    return [tensor.detach().clone() for tensor in tensors(out)]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference between two outputs, relative to the largest value of its tensor; infinite if shapes differ."""
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return float("inf")
    return max(_distance(a.double(), b.double()) for a, b in zip(one, other, strict=True))


def _distance(a: Tensor, b: Tensor) -> float:
    alike = (a == b) | (a.isnan() & b.isnan())
    if bool(alike.all()):
        return 0.0
    scale = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
    difference = float((a - b).abs().masked_fill(alike, 0).max())
    return difference / scale if scale and difference == difference else float("inf")


def kind(path: str) -> str:
    """A module's path with `*` for the numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool(((one == other) | (one.isnan() & other.isnan())).all())
    )


def _reached(plain: nn.Module, given: dict[str, Any]) -> dict[str, bool]:
    """Path → whether the module's weight gets a gradient that is not zero, in a base that trains with all its weights."""
    weights = {
        path: module.weight
        for path, module in plain.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    for parameter in plain.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for step in range(STEPS):
        loss(plain, given, step).backward()
    return {
        path: weight.grad is not None and bool(weight.grad.any())
        for path, weight in weights.items()
    }


def _adapted(model: nn.Module, found: Found) -> lk.Adapter | None:
    """The adapter, or None if the whole model was refused; notes what was left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lk.LorakinWarning)
        try:
            heads = new_heads(model, ())  # trained whole, as users do
            adapter = lk.adapt(model, lk.LoRA(rank=2), "all-linear", modules_to_save=heads, seed=0)
        except lk.LorakinError as error:
            found.refused[""] = str(error)
            adapter = None
    for warning in caught:
        if issubclass(warning.category, lk.LorakinWarning):
            said = LEFT_OUT.match(str(warning.message))
            if said is None:
                raise warning.message
            found.refused[kind(said[1])] = said[2]
    return adapter


def _train(model: nn.Module, adapter: lk.Adapter, given: dict[str, Any], found: Found) -> None:
    optimizer = adapter.optimizer(lr=1e-2)
    given_one, moved = set(), set()
    for step in range(STEPS):
        value = loss(model, given, step)
        value.backward()
        found.losses.append(float(value))
        for name, tensor in adapter.named_parameters():
            if tensor.grad is not None:
                given_one.add(name)
            if tensor.grad is not None and bool(tensor.grad.any()):
                moved.add(name.rpartition(".")[0])
        optimizer.step()
        optimizer.zero_grad()
    sites = adapter.placement.methods.keys() - set(found.unused)
    names = [name for name, _ in adapter.tensors.trained() if name.rpartition(".")[0] in sites]
    found.ungiven = [name for name in names if name not in given_one]
    found.unmoved = sorted({name.rpartition(".")[0] for name in names} - moved)


CHECKS: dict[str, Callable[[Found], bool]] = {
    "no gradient": lambda found: bool(found.ungiven),
    "zero gradient": lambda found: bool(found.unmoved),
    "random in eval mode": lambda found: found.unlike_itself > 0,
    "output does not move": lambda found: found.moved <= MOVED,
    "merged is not unmerged": lambda found: found.merged > EXACT,
    "unmerging is not exact": lambda found: found.unmerged > 0,
    "loaded is not saved": lambda found: found.loaded > SAME,
    "base not given back": lambda found: bool(found.changed),
    "base's output not given back": lambda found: found.removed > 0,
}
"""Kind of failure → whether it is there."""


def failures(found: Found) -> list[str]:
    """The kinds of failure found; none on a model that was refused as a whole."""
    return [kind for kind, fails in CHECKS.items() if found.adapted and fails(found)]
