"""What every member of the family is: one file that says what it decides about a weight's low-rank pair (`pair.py`).

A *parametrisation* hangs tensors on a weight and makes the pair of them; a *modifier* changes how a pair is
started, trained, shared, moved or scaled. What happens while training is a member's `Rule`, driven by the optimizer's
steps. `composition.py` puts members together. CONTRIBUTING.md shows a member in ten lines.
"""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from lorakin.family.pair import Chain, Pair, Shape, Tensors, Weight
from lorakin.family.settings import check_pair_settings, whole_number

if TYPE_CHECKING:
    from lorakin.family.composition import Method


class Role(NamedTuple):
    """What a tensor is to an optimizer."""

    trained: bool = True
    starts_at_zero: bool = False
    """It is the factor that makes the change zero at the start."""
    decays: bool = True
    """Weight decay may act on it."""
    of_pair: bool = True
    """It belongs to the pair, so that modules that share one share it too."""


FIXED = Role(trained=False)


class Target(NamedTuple):
    """A weight that is about to be adapted: its shape, and its matrix (outputs, inputs), on the meta device if unknown."""

    shape: Shape
    weight: Tensor | Weight


class Probe(NamedTuple):
    """A short training run before the real one, after which a member chooses its modules by their importance."""

    sample: float
    """The share of the data to train on."""
    epochs: int
    """How often to see it."""
    normalised: bool
    """Whether importance is relative to the size of each module's own output."""


class AdaptedModule(Protocol):
    """An adapted module as a `Rule` sees it."""

    @property
    def path(self) -> str:
        """Where the module is in the model."""

    @property
    def shape(self) -> Shape:
        """The shape of its weight."""

    @property
    def method(self) -> Method:
        """The method, with this module's own rank and alpha."""

    @property
    def weight(self) -> Tensor | Weight:
        """Its base weight as a matrix (outputs, inputs)."""

    def tensors(self) -> dict[str, nn.Parameter]:
        """Its tensors by slot."""

    def trains(self, slot: str) -> bool:
        """Whether the method trains this tensor."""

    def put(self, slot: str, tensor: Tensor) -> None:
        """Give it one more tensor, which does not train."""

    def take(self, slot: str) -> Tensor:
        """Take such a tensor away from it."""

    def move_base(self, change: Tensor) -> None:
        """Add `change` (outputs, inputs) to a copy of the base weight, which takes its place."""

    def restore_base(self) -> None:
        """Put the base's own weight back, if it was moved."""


class Rule:
    """What a member does at the optimizer steps of one adapter, and what it remembers between them.

    n counts real optimizer steps from 1: accumulated batches are one step, a skipped step is none.
    """

    turns: tuple[int, ...] = ()
    """The steps after which it holds more tensors than before, so that memory is planned for what follows them."""

    def before(self, n: int) -> None:
        """Gradients are complete, unscaled, not yet used: read or change them."""

    def after(self, n: int, optimizer: torch.optim.Optimizer) -> None:
        """The step has been taken: change tensors."""

    def end(self) -> None:
        """The run is over, or goes on elsewhere: leave nothing outside the adapter's tensors."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs: numbers, texts, tensors, and dicts of them."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state()` gave; the adapter's tensors are restored already."""

    def beside(self, path: str) -> Tensors:
        """Tensors that the adapter's files must hold beside those of the module at `path`."""
        return {}

    def gave_up(self, place: AdaptedModule) -> bool:
        """Whether the member itself has taken all ranks from this module, so that it is right if it changes nothing."""
        return False

    def check(self, n: int) -> str | None:
        """What the member was to do and did not, after n steps; asked when the adapter is saved."""
        return None


class Member(ABC):
    """One method of the family. Subclasses are frozen dataclasses whose fields are the settings."""

    word: ClassVar[str]
    """Its name on the command line, in recipes and in files."""
    paper: ClassVar[str]
    """Title and identifier of the paper."""
    decides: ClassVar[Mapping[str, str]] = {"parametrisation": "tensors of its own"}
    """Axis (see `composition.AXES`) → what it chooses there. Members that choose on the same axis do not combine."""
    remark: ClassVar[str] = ""
    """What a user should know before choosing it."""
    in_probe: ClassVar[bool] = True
    """Whether it takes part in a probe that precedes training."""

    @property
    def acts_at_steps(self) -> bool:
        """Whether without its `rule` it would be another method."""
        return False

    @classmethod
    def setting_names(cls) -> frozenset[str]:
        """The names of its settings."""
        return frozenset(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @property
    def alpha_factor(self) -> float:
        """Under Adam it is its pair alone with alpha times this, to be compared with that; 1 if it is no such thing."""
        return 1.0

    @classmethod
    def fair(cls, rank: int, scaling: float, steps: int) -> dict[str, Any]:
        """Its settings beside others of one rank and scale, in a run of so many steps; None for what it refuses from them."""
        common = {"rank": rank, "alpha": scaling * rank}
        return {name: value for name, value in common.items() if name in cls.setting_names()}

    def resolved(self, method: Method, total_steps: int | None) -> Self:
        """Itself, with settings left open decided for a run of so many steps; raises `SettingError` if it cannot be run."""
        return self

    def unmoved(self, places: Sequence[AdaptedModule]) -> str | None:
        """What of its own training never reached, asked when the adapter is saved."""
        return None

    def rule(self, places: Sequence[AdaptedModule]) -> Rule | None:
        """What it does while training the adapter on `places`, if anything. `resolved` was called before."""
        return None


class Parametrisation(Member):
    """A member that hangs tensors on a weight and makes the pair of them."""

    learning_rate: ClassVar[float]
    """The learning rate that `lorakin train` takes when none is given."""
    frozen: ClassVar[frozenset[str]] = frozenset()
    """Names of tensors that are kept but never trained."""
    per_module: ClassVar[frozenset[str]] = frozenset({"rank", "alpha"})
    """Settings that single modules may have their own of."""
    of_no_account: ClassVar[frozenset[str]] = frozenset()
    """Settings that say how the pair starts, or what was freed of it, and not what it is."""
    per_rank: ClassVar[str | None] = None
    """The tensor that scales each rank, by which a rank can be switched off; None if there is none."""
    per_rank_sides: ClassVar[tuple[str, ...]] = ()
    """The trained factors on both sides of `per_rank`: one with a column for each rank, one with a row."""

    dropout: float
    """Probability of zeroing an entry of the branch's input, in train mode only."""

    def check(self, shape: Shape, where: str) -> None:
        """Raise `SettingError` if these settings do not fit a weight of this shape; `where` is the module's path."""

    def clamped(self, shape: Shape) -> Mapping[str, int]:
        """The setting that gives a module no more ranks than its weight of this shape has; {} if it has no more anyway."""
        return {}

    def start(
        self, shape: Shape, generator: torch.Generator | None, device: torch.device
    ) -> Tensors:
        """The tensors of one module at initialisation, by slot; float32, drawn with `generator`."""
        raise NotImplementedError

    def start_all(
        self,
        targets: Mapping[str, Target],
        each: Mapping[str, Self],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> dict[str, Tensors]:
        """The tensors of all modules, by path; `each` is this member with the settings of each module."""
        return {
            path: each[path].start(target.shape, generator, device)
            for path, target in targets.items()
        }

    def roles(self, shape: Shape) -> dict[str, Role]:
        """What each tensor is to an optimizer; those not named are trained, or FIXED if they are in `frozen`."""
        return {}

    def projection(self, shape: Shape) -> str:
        """The random factor that LoRA-FA keeps as it was drawn."""
        raise NotImplementedError

    def keep_projection(self, tensors: Tensors, shape: Shape) -> Tensors:
        """`tensors` as they should start if the projection never trains."""
        return tensors

    def pair(self, tensors: Mapping[str, Tensor], shape: Shape) -> Pair:
        """The pair that these tensors stand for, differentiable in them."""
        raise NotImplementedError

    def factors(self, tensors: Mapping[str, Tensor], shape: Shape) -> tuple[Pair, float]:
        """The same pair before its scale is in `up`, and the scale, so that kernels can take the tensors as they are."""
        return self.pair(tensors, shape), 1.0

    def chain(self, tensors: Mapping[str, Tensor]) -> Chain | None:
        """The same pair as frozen matrices between trained vectors, if it is that."""
        return None


@dataclass(frozen=True, kw_only=True)
class Modifier(Member):
    """A member that needs another's pair: plain LoRA's, unless the method names a parametrisation.

    `rank`, `alpha`, `dropout` and `rslora` are that pair's; None leaves them to it.
    """

    pair_settings: ClassVar[tuple[str, ...]] = ("rank", "alpha", "dropout", "rslora")
    """Fields that are the pair's."""
    pair_defaults: ClassVar[Mapping[str, Any]] = {}
    """Its own defaults for the pair."""
    learning_rate_factor: ClassVar[float] = 1.0
    """By how much the usual learning rate of the pair changes."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    rslora: bool | None = None

    def __post_init__(self) -> None:
        whole_number(self, "rank", at_least=1, optional=True)
        check_pair_settings(self, optional=True)

    def default_pair(self) -> type[Parametrisation] | None:
        """The parametrisation that it needs if none is named; None leaves it to others, and at last to LoRA."""
        return None

    def misfit(self, parametrisation: type[Parametrisation]) -> str | None:
        """Why it cannot work on such a pair, or None."""
        return None

    def vacuous(self, method: Method, roles: Mapping[str, Role]) -> str | None:
        """Why it would do nothing in this method, whose pair has tensors of these roles; or None."""
        return None

    def check_pair(self, parametrisation: Parametrisation) -> None:
        """Raise `SettingError` if it cannot work on a pair with these settings."""

    def probe(self) -> Probe | None:
        """The probe that it still needs, if any."""
        return None

    def with_importance(self, importance: Mapping[str, float]) -> Self:
        """Itself, with what its probe found: path → share of the importance."""
        return self

    def among(self, paths: Sequence[str]) -> Self:
        """Itself, for an adapter whose targets are exactly these modules; raises `SettingError` if it cannot be."""
        return self

    def own_pairs(self, paths: Sequence[str]) -> list[str]:
        """Which modules have a pair of their own."""
        return list(paths)

    def select(self, paths: Sequence[str]) -> list[str]:
        """Which of the targeted modules get a pair at all."""
        return list(paths)

    def extend(
        self,
        tensors: dict[str, Tensors],
        targets: Mapping[str, Target],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        """All modules' tensors at the start, with this member's among them or in place of others."""
        return tensors

    def share(
        self,
        tensors: dict[str, Tensors],
        targets: Mapping[str, Target],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        """All modules' tensors, with one object wherever modules share a tensor."""
        return tensors

    def amend_roles(
        self, roles: dict[str, Role], path: str, shape: Shape, parametrisation: Parametrisation
    ) -> dict[str, Role]:
        """The roles of a module's tensors, this member's own included."""
        return roles

    def amend_pair(self, pair: Pair, tensors: Mapping[str, Tensor]) -> Pair:
        """What this member makes of the pair."""
        return pair

    def gain(
        self, pair: Pair, tensors: Mapping[str, Tensor], weight: Tensor | Weight
    ) -> Tensor | None:
        """The gain (outputs,) over the weight (outputs, inputs) and the pair, if this member has one."""
        return None

    def rate(self, lr: float, role: Role, shape: Shape) -> float:
        """The learning rate of a tensor, given the base rate."""
        return lr
