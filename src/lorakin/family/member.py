"""What every member of the family is: one class that declares its tensors and what they do.

A *parametrisation* brings the slots of the low-rank pair and says how they change the weight. A
*modifier* changes how a pair starts, trains, is shared, moves or scales. What happens at optimizer
steps is a member's `Rule`. `composition.py` puts members together. CONTRIBUTING.md shows a member
in ten lines.
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
from lorakin.family.measure import Collector, Probe, UnadaptedModule
from lorakin.family.pair import Pair, Shape, Tensors
from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.settings import check_pair_settings, to_whole_number
from lorakin.family.slots import Slots
from lorakin.family.weight import FrozenWeight

if TYPE_CHECKING:
    from lorakin.family.method import Method


class Member(ABC):
    """One method of the family. Subclasses are frozen dataclasses; the fields are the settings."""

    word: ClassVar[str]
    """Its name on the command line, in recipes and in files."""
    paper: ClassVar[str]
    """Title and identifier of the paper."""
    decides: ClassVar[Mapping[str, str]]
    """Axis (see `composition.AXES`) → what it decides there. Two members on one axis clash."""
    slots: ClassVar[Slots] = {}
    """The tensors that it hangs on each module."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it looks at before it starts, besides shapes: see `measure.py`."""
    remark: ClassVar[str] = ""
    """What a user should know before choosing it."""
    test_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings for tests on tiny models, in runs of six steps or more."""
    in_probe: ClassVar[bool] = True
    """Whether it takes part in a probe that precedes training."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "word" in vars(cls) and not getattr(cls, "decides", None):
            raise SettingError(
                f"{cls.__name__} does not say what it decides; give it decides = {{axis: what it "
                "decides there}, with an axis of lorakin.family.AXES or one of its own"
            )

    @property
    def acts_at_steps(self) -> bool:
        """Whether it would be another method without its `rule`."""
        return False

    def largest_rank(self, shape: Shape) -> int:
        """The largest rank that it allows on a weight of this shape."""
        return min(shape.outputs, shape.inputs)

    @classmethod
    def setting_names(cls) -> frozenset[str]:
        """The names of its settings."""
        return frozenset(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @property
    def alpha_factor(self) -> float:
        """If under Adam it equals its pair with a larger alpha, by what factor; else 1."""
        return 1.0

    @classmethod
    def comparable_settings(cls, rank: int, scaling: float, steps: int) -> dict[str, Any]:
        """Its settings in a comparison with others of one rank and scale, for a run of `steps`.

        None marks a setting of the others that it does not take.
        """
        common = {"rank": rank, "alpha": scaling * rank}
        return {name: value for name, value in common.items() if name in cls.setting_names()}

    def gain(
        self, pair: Pair, tensors: Mapping[str, Tensor], weight: Tensor | FrozenWeight
    ) -> Tensor | None:
        """The gain (outputs,) over the weight (outputs, inputs) and pair, if it has one."""
        return None

    def resolved(self, method: Method, total_steps: int | None) -> Self:
        """Itself, with open settings decided for a run of so many steps.

        Raises:
            SettingError: it does not fit such a run.
        """
        return self

    def unmoved(self, modules: Sequence[AdaptedModule]) -> str | None:
        """Which of its tensors training never reached; asked when the adapter is saved."""
        return None

    def rule(self, modules: Sequence[AdaptedModule]) -> Rule | None:
        """What it does at optimizer steps, if anything; `resolved` has been called before."""
        return None


class Parametrisation(Member):
    """A member that brings the pair: its slots, their start, and the change they make."""

    decides: ClassVar[Mapping[str, str]] = {"parametrisation": "the pair has slots of its own"}
    learning_rate: ClassVar[float]
    """The learning rate that `lorakin train` takes when none is given."""
    lookup_slots: ClassVar[Slots | None] = None
    """Its slots on an embedding, whose `inputs` are the vocabulary; None if it cannot adapt one."""
    per_module: ClassVar[frozenset[str]] = frozenset({"rank", "alpha"})
    """Settings that a single module may have its own of."""
    not_compared: ClassVar[frozenset[str]] = frozenset()
    """Settings that say how the pair starts or what was freed, not what it computes."""

    dropout: float
    """Probability of zeroing an entry of the branch's input, in train mode only."""

    @classmethod
    def settings_of_modules(cls) -> frozenset[str]:
        """Those of its settings that a single module may have its own of."""
        return cls.per_module & cls.setting_names()

    def slots_at(self, shape: Shape) -> Slots:
        """Its slots on a weight of this shape."""
        return self.lookup_slots if shape.lookup and self.lookup_slots is not None else self.slots

    def check(self, shape: Shape, where: str) -> None:
        """Raise `SettingError` if the settings do not fit a weight of this shape at `where`."""

    def clamped(self, largest: int) -> Mapping[str, int]:
        """The setting that gives a module the rank `largest`; {} if its rank is not above it."""
        return {}

    def start(
        self, module: UnadaptedModule, generator: torch.Generator | None, device: torch.device
    ) -> Tensors:
        """One module's tensors at the start, by slot: float32, drawn with `generator`."""
        raise NotImplementedError

    def start_all(
        self,
        modules: Mapping[str, UnadaptedModule],
        each: Mapping[str, Self],
        generator: torch.Generator | None,
        device: torch.device,
    ) -> dict[str, Tensors]:
        """All modules' tensors at the start, by path.

        `each` is this member with the settings of each module.
        """
        return {path: each[path].start(at, generator, device) for path, at in modules.items()}

    def start_if_frozen(self, tensors: Tensors) -> Tensors:
        """The tensors as they should start if the `drawn` slot never trains."""
        return tensors

    def change(self, tensors: Mapping[str, Tensor]) -> Change:
        """The change of the weight that these tensors make, differentiable in them."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Modifier(Member):
    """A member that works on another's pair: plain LoRA's, unless a parametrisation is named.

    `rank`, `alpha`, `dropout` and `rslora` are settings of that pair; None leaves them to it.
    """

    pair_settings: ClassVar[tuple[str, ...]] = ("rank", "alpha", "dropout", "rslora")
    """Fields that are the pair's."""
    pair_defaults: ClassVar[Mapping[str, Any]] = {}
    """Its own defaults for the pair."""
    peft_start: ClassVar[str] = ""
    """PEFT's word for it in `init_lora_weights`, if it is a start that PEFT has."""
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
        """The parametrisation that it needs if none is named; None if any will do."""
        return None

    def refusal_of_pair(self, parametrisation: type[Parametrisation]) -> str | None:
        """Why it cannot work on such a pair; None if it can."""
        return None

    def refusal_of_method(self, method: Method, slots: Slots) -> str | None:
        """Why it would have no effect on modules with these slots; None if it has one."""
        return None

    def check_pair(self, parametrisation: Parametrisation) -> None:
        """Raise `SettingError` if it cannot work on a pair with these settings."""

    def check(self, shape: Shape, where: str, method: Method) -> None:
        """Raise `SettingError` if it cannot work on a weight of this shape at the path `where`."""

    # Before it starts: what it looks at, and what it chooses by that.

    def needed_probe(self) -> Probe | None:
        """The probe that it still needs, if any."""
        return None

    def with_importance(self, importance: Mapping[str, float]) -> Self:
        """Itself with what its probe found: path → share of the importance."""
        return self

    @property
    def batches(self) -> int | None:
        """How many batches it looks at, at most; None for as many as there are."""
        return None

    def collector(
        self, modules: Mapping[str, UnadaptedModule], methods: Mapping[str, Method]
    ) -> Collector:
        """What takes in these modules' inputs or gradients, if it `needs` them."""
        raise NotImplementedError

    def settings_found(
        self, found: Mapping[str, Any], methods: Mapping[str, Method]
    ) -> dict[str, Mapping[str, Any] | None]:
        """Path → the pair's settings there, from what was found; None leaves a module out."""
        return {}

    def bound_to(self, paths: Sequence[str]) -> Self:
        """Itself, for an adapter with exactly these targets.

        Raises:
            SettingError: it does not fit them.
        """
        return self

    def with_own_pair(self, paths: Sequence[str]) -> list[str]:
        """Which modules have a pair of their own."""
        return list(paths)

    def with_pair(self, paths: Sequence[str]) -> list[str]:
        """Which of the targeted modules get a pair at all."""
        return list(paths)

    # Its tensors.

    def amend_start(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        """All modules' tensors at the start, with what this member adds or replaces."""
        return tensors

    def share(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        """All modules' tensors; modules that share a tensor hold the same object."""
        return tensors

    def amend_slots(self, slots: Slots, path: str, shape: Shape) -> Slots:
        """A module's slots, this member's own included."""
        return {**slots, **self.slots}

    # What it computes.

    def amend_pair(self, pair: Pair, tensors: Mapping[str, Tensor]) -> Pair:
        """The pair as this member changes it."""
        return pair

    def beside_pair(self, pair: Pair, tensors: Mapping[str, Tensor]) -> Pair:
        """The pair with a constant change beside it, such as a start's anchor."""
        return pair
