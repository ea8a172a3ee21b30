"""What every member of the family is: one class that declares its tensors and what they do.

A *parametrisation* brings the slots of the low-rank pair and says how they change the weight. A
*modifier* changes how a pair starts, trains, is shared, moves or scales. What happens at optimizer
steps is a member's `Rule`. `composition.py` puts members together. CONTRIBUTING.md has examples.
"""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from lorakin.errors import SettingError
from lorakin.family.change import Change
from lorakin.family.measure import GRADIENTS, INPUTS, NEEDS, Collector, UnadaptedModule
from lorakin.family.pair import Pair, ScaledPair, Shape, Tensors
from lorakin.family.probe import Probe
from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.settings import check_pair_settings, check_rank, to_whole_number
from lorakin.family.slots import Slots
from lorakin.family.weight import FrozenWeight

if TYPE_CHECKING:
    from lorakin.family.method import Method

AMENDING = ("amend_pair", "beside_pair")
"""The hooks by which a modifier changes the pair."""
COMPUTING = ("gain", *AMENDING, "share")
"""The hooks by which a modifier takes part in what is computed; all others act in training only."""


class Member(ABC):
    """One method of the family. Subclasses are frozen dataclasses; the fields are the settings."""

    word: ClassVar[str]
    """Its name on the command line, in recipes and in files."""
    paper: ClassVar[str] = ""
    """Title and identifier of the paper."""
    decides: ClassVar[Mapping[str, str]]
    """Axis (see `composition.AXES`) → what it decides there. Two members on one axis conflict."""
    slots: ClassVar[Slots] = {}
    """The tensors that it adds to each module."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it looks at before it starts, besides shapes: see `measure.py`."""
    remark: ClassVar[str] = ""
    """What a user should know before choosing it."""
    test_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings for tests on tiny models, in runs of six steps or more."""
    in_probe: ClassVar[bool] = True
    """Whether LoRA-drop's probe trains it too."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "word" in vars(cls) and not getattr(cls, "decides", None):
            raise SettingError(
                f"{cls.__name__} does not say what it decides; give it decides = {{axis: what it "
                "decides there}, with an axis of lorakin.family.AXES or one of its own"
            )
        if (unknown := cls.needs - NEEDS) or {INPUTS, GRADIENTS} <= cls.needs:
            what = f"an unknown {min(unknown)!r}" if unknown else "both inputs and gradients"
            raise SettingError(
                f"{cls.__name__} needs {what}; a member may need {', '.join(sorted(NEEDS))}, but "
                "not inputs and gradients together"
            )

    @property
    def acts_at_steps(self) -> bool:
        """Whether training without its `rule` would train another method.

        If so, one optimizer must hold all its tensors.
        """
        return False

    def largest_rank(self, shape: Shape) -> int:
        """Returns the largest rank that it allows on a weight of this shape."""
        return min(shape.outputs, shape.inputs)

    @classmethod
    def setting_names(cls) -> frozenset[str]:
        """Returns the names of its settings."""
        return frozenset(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @property
    def alpha_factor(self) -> float:
        """The factor on alpha at which plain LoRA trains the same under Adam; 1 if there is none.

        `lorakin compare` adds that LoRA as a control.
        """
        return 1.0

    @classmethod
    def comparable_settings(cls, rank: int, scaling: float, steps: int) -> dict[str, Any]:
        """Returns its settings in a comparison with others of one rank and scale.

        `steps` is the length of the runs. None marks a setting of the others that it does not take.
        """
        common = {"rank": rank, "alpha": scaling * rank}
        return {name: value for name, value in common.items() if name in cls.setting_names()}

    def gain(
        self, change: ScaledPair, tensors: Mapping[str, Tensor], weight: Tensor | FrozenWeight
    ) -> Tensor | None:
        """Returns the gain (outputs,) over the weight (outputs, inputs) and pair, if it has one."""
        return None

    def resolved(self, method: Method, total_steps: int | None) -> Self:
        """Returns a copy whose open settings are decided for a run of `total_steps` steps.

        Raises:
            SettingError: it does not fit such a run.
        """
        return self

    def unmoved(self, modules: Sequence[AdaptedModule]) -> str | None:
        """Returns which of its tensors training never reached; called when the adapter is saved."""
        return None

    def rule(self, modules: Sequence[AdaptedModule]) -> Rule | None:
        """Returns what it does at optimizer steps, if anything; `resolved` has been called."""
        return None


class Parametrisation(Member):
    """A member that brings the pair: its slots, their start, and the change they make."""

    decides: ClassVar[Mapping[str, str]] = {"parametrisation": "the pair has slots of its own"}
    learning_rate: ClassVar[float] = 2e-4
    """The learning rate that `lorakin train` takes when none is given."""
    frees_ranks: ClassVar[bool] = False
    """Whether training may free some of its `initial_rank` ranks; `kept` says how many are left."""
    lookup_slots: ClassVar[Slots | None] = None
    """Its slots on an embedding, whose `inputs` are the vocabulary; None if it cannot adapt one."""
    per_module: ClassVar[frozenset[str]] = frozenset({"rank", "alpha"})
    """Settings that can have another value on a single module."""
    not_compared: ClassVar[frozenset[str]] = frozenset()
    """Settings that do not change what the pair computes: methods that differ in them agree."""

    dropout: float
    """Probability of zeroing an entry of the branch's input, in train mode only."""

    @property
    def scaling(self) -> float:
        """s, the factor in front of the pair's product; 1 if it has none."""
        return 1.0

    @classmethod
    def settings_of_modules(cls) -> frozenset[str]:
        """Returns those of its settings that can have another value on a single module."""
        return cls.per_module & cls.setting_names()

    def slots_at(self, shape: Shape) -> Slots:
        """Returns its slots on a weight of this shape."""
        return self.lookup_slots if shape.lookup and self.lookup_slots is not None else self.slots

    def check(self, shape: Shape, path: str) -> None:
        """Checks that the settings, by default the rank, fit the weight of the module at `path`.

        Raises:
            SettingError: they do not.
        """
        rank = getattr(self, "rank", None)
        if rank is not None:
            check_rank(rank, shape, path, self.largest_rank(shape))

    def clamped(self, largest: int) -> Mapping[str, int]:
        """Returns the setting that lowers a module's rank to `largest`; {} if it is not above."""
        if "rank" not in self.settings_of_modules() or getattr(self, "rank", 0) <= largest:
            return {}
        return {"rank": largest}

    def start(
        self, module: UnadaptedModule, generator: torch.Generator | None, device: torch.device
    ) -> Tensors:
        """Returns one module's initial tensors by slot: float32, drawn with `generator`."""
        raise NotImplementedError

    def start_all(
        self,
        modules: Mapping[str, UnadaptedModule],
        pairs: Mapping[str, Self],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> dict[str, Tensors]:
        """Returns all modules' initial tensors by path.

        `pairs` holds this member by path, with the settings of each module.
        """
        return {
            path: pairs[path].start(module, generator, device) for path, module in modules.items()
        }

    def start_if_frozen(self, tensors: Tensors) -> Tensors:
        """Returns the initial tensors for a random factor that never trains (LoRA-FA)."""
        return tensors

    def change(self, tensors: Mapping[str, Tensor]) -> Change:
        """Returns the change of the weight that these tensors make, differentiable in them."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Modifier(Member):
    """A member that works on another's pair: plain LoRA's, unless a parametrisation is named.

    `rank`, `alpha`, `dropout` and `rslora` are settings of that pair; None leaves them to it.
    """

    pair_settings: ClassVar[tuple[str, ...]] = ("rank", "alpha", "dropout", "rslora")
    """Fields that are settings of the pair."""
    pair_defaults: ClassVar[Mapping[str, Any]] = {}
    """Its own defaults for the pair."""
    learning_rate_factor: ClassVar[float] = 1.0
    """The factor on the pair's usual learning rate."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    rslora: bool | None = None

    def __post_init__(self) -> None:
        to_whole_number(self, "rank", at_least=1, optional=True)
        check_pair_settings(self, optional=True)

    def default_pair(self) -> type[Parametrisation] | None:
        """Returns the parametrisation that it needs if none is named; None if any will do."""
        return None

    def refusal_of_pair(self, pair_class: type[Parametrisation]) -> str | None:
        """Returns why it cannot work on such a pair; None if it can."""
        return None

    def refusal_of_method(self, method: Method, slots: Slots) -> str | None:
        """Returns why it refuses this method, whose modules have these slots; None if it does not.

        LoRA+ does if only one factor trains, so that its ratio would have no effect.
        """
        return None

    def check_pair(self, pair: Parametrisation) -> None:
        """Checks that it can work on a pair with these settings.

        Raises:
            SettingError: it cannot.
        """

    def check(self, shape: Shape, path: str, method: Method) -> None:
        """Checks that it can work on a weight of this shape, that of the module at `path`.

        Raises:
            SettingError: it cannot.
        """

    # Before it starts: what it looks at, and what it chooses by that.

    def needed_probe(self) -> Probe | None:
        """Returns the probe that it still needs, if any (LoRA-drop)."""
        return None

    def with_importance(self, importance: Mapping[str, float]) -> Self:
        """Returns a copy with what its probe found: path → share of the importance."""
        return self

    @property
    def batches(self) -> int | None:
        """How many batches it looks at, at most; None for each batch once.

        Inputs are measured on the same batches again if there are fewer.
        """
        return None

    def collector(
        self, modules: Mapping[str, UnadaptedModule], methods: Mapping[str, Method]
    ) -> Collector:
        """Returns what takes in these modules' inputs or gradients, if it `needs` them."""
        raise NotImplementedError

    def settings_found(
        self, results: Mapping[str, Any], methods: Mapping[str, Method]
    ) -> dict[str, Mapping[str, Any] | None]:
        """Returns path → the pair's settings there by the collector's results (EVA's ranks).

        None leaves a module out.
        """
        return {}

    def bound_to(self, paths: Sequence[str]) -> Self:
        """Returns a copy for an adapter of exactly these modules.

        Raises:
            SettingError: it does not fit them.
        """
        return self

    def with_pair(self, paths: Sequence[str]) -> list[str]:
        """Returns those of the targeted modules that get a pair at all."""
        return list(paths)

    def with_own_pair(self, paths: Sequence[str]) -> list[str]:
        """Returns those of the modules whose pair is not shared with others."""
        return list(paths)

    # Its tensors.

    def amend_start(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        """Returns all modules' initial tensors, with what this member adds or replaces."""
        return tensors

    def share(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        """Returns all modules' tensors; modules that share a tensor hold the same object."""
        return tensors

    def amend_slots(self, slots: Slots, path: str, shape: Shape) -> Slots:
        """Returns a module's slots, this member's own included."""
        return {**slots, **self.slots}

    # What it computes.

    def amend_pair(self, pair: Pair, tensors: Mapping[str, Tensor]) -> Pair:
        """Returns the pair as this member changes it."""
        return pair

    def beside_pair(self, pair: Pair, tensors: Mapping[str, Tensor]) -> Pair:
        """Returns the pair with a constant change added, such as a start's anchor.

        It is called after every member's `amend_pair`.
        """
        return pair


def overrides(member: Member, hook: str) -> bool:
    """Returns whether a member defines this hook itself; the base classes' does nothing."""
    base = Modifier if isinstance(member, Modifier) else Member
    return getattr(type(member), hook) is not getattr(base, hook)
