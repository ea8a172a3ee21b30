"""What every member of the family is: a frozen weight, a low-rank pair beside it, perhaps a gain over both.

    W  =  diag(gain) · (W0 + up · down)          up: (out, k)   down: (k, in)   gain: (out,) or absent

Merging, files, counts, norms and pictures are written once, against `Pair`. A member is one file that says which
tensors it hangs on a module, which of them train, and how they make the pair. CONTRIBUTING.md shows one in ten lines.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lorakin.errors import SettingError


class Shape(NamedTuple):
    """The matrix that a module's weight is, whatever the module's own layout.

    `outputs` × `inputs`; a convolution's `inputs` are its input channels times its kernel. A `lookup` (an embedding)
    picks columns of the matrix instead of multiplying by it: its `inputs` are the vocabulary.
    """

    outputs: int
    inputs: int
    lookup: bool = False


class Pair(NamedTuple):
    """The change of one weight: `up` (outputs, k), `down` (k, inputs), `gain` (outputs,) or None.

    Scales such as alpha/rank live inside `up`.
    """

    up: Tensor
    down: Tensor
    gain: Tensor | None = None

    def applied_to(self, weight: Tensor) -> Tensor:
        """The changed weight diag(gain)·(W0 + up·down), (outputs, inputs), in the dtype of `weight`."""
        changed = weight + (self.up.to(weight.dtype) @ self.down.to(weight.dtype))
        return changed if self.gain is None else self.gain.to(weight.dtype).unsqueeze(1) * changed

    def norm(self) -> float:
        """The Frobenius norm of up·down, without forming it."""
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())


class Member(ABC):
    """One way to parametrise the change of a weight: its settings, its tensors, its pair.

    Subclasses are frozen dataclasses whose fields are the settings; `__post_init__` validates them.
    """

    word: ClassVar[str]
    """Its name on the command line, in recipes and in files."""
    paper: ClassVar[str]
    """Title and identifier of the paper."""
    learning_rate: ClassVar[float]
    """The learning rate that `lorakin train` takes when none is given."""
    frozen: ClassVar[frozenset[str]] = frozenset()
    """Names of tensors that are kept but never trained."""

    dropout: float
    """Probability of zeroing an entry of the branch's input, in train mode only."""

    def check(self, shape: Shape, where: str) -> None:  # noqa: B027 - a member without limits needs no check
        """Raise `SettingError` if these settings do not fit a weight of this shape; `where` is the module's path."""

    @abstractmethod
    def start(self, shape: Shape, generator: torch.Generator | None, device: torch.device) -> dict[str, Tensor]:
        """The tensors of one module at initialisation, by name; float32, drawn with `generator`."""

    @abstractmethod
    def pair(self, tensors: Mapping[str, Tensor]) -> Pair:
        """The pair that these tensors stand for, differentiable in them."""


def require(condition: bool, message: str) -> None:
    """Raise `SettingError(message)` unless `condition` holds."""
    if not condition:
        raise SettingError(message)


def whole_number(settings: object, name: str, at_least: int) -> None:
    """Make the field `name` of a frozen dataclass a plain int, or raise `SettingError`."""
    value = getattr(settings, name)
    try:
        plain = operator.index(value)
    except TypeError:
        plain = at_least - 1
    require(plain >= at_least and not isinstance(value, bool), f"{name} must be a whole number ≥ {at_least}, not {value!r}")
    object.__setattr__(settings, name, plain)


def number(settings: object, name: str, fits: Callable[[float], bool], expected: str) -> None:
    """Make the field `name` of a frozen dataclass a plain float that `fits`, or raise `SettingError`."""
    value = getattr(settings, name)
    try:
        plain = float("nan") if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        plain = float("nan")
    require(fits(plain), f"{name} must be {expected}, not {value!r}")
    object.__setattr__(settings, name, plain)
