"""A method: members that work together, and what they compute on each module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from lorakin.errors import SettingError
from lorakin.family.agreement import difference
from lorakin.family.change import Chain, Change, LowRank
from lorakin.family.composition import composed
from lorakin.family.declared_slots import check_declared, check_finite
from lorakin.family.measure import GRADIENTS, INPUTS, UnadaptedModule
from lorakin.family.member import AMENDING, Member, Modifier, Parametrisation, overrides
from lorakin.family.pair import Pair, ScaledPair, Shape, Tensors
from lorakin.family.precision import cast_keeping_shared, copied_keeping_shared, wide_dtype
from lorakin.family.probe import Probe
from lorakin.family.registry import default_pair
from lorakin.family.rule import AdaptedModule, Rule
from lorakin.family.settings import check_storable, require
from lorakin.family.slots import Slots
from lorakin.family.weight import FrozenWeight


@dataclass(frozen=True)
class Method:
    """One parametrisation and what modifies it. Made by `Method.of`.

    `members` are those that the user named, in the order of their axes. What they compute on a
    module can be had in four forms:

    | method | returns | gain | scale | for |
    |---|---|---|---|---|
    | `low_rank` | `Pair` | left out | in `up` | PEFT's files, importance, DoRA's start |
    | `pair` | `Pair` | over the given weight | in `up` | merging, mixed batches, other layers |
    | `scaled_pair` | `ScaledPair` | over the given weight | beside `up` | experts |
    | `linear_change` | `ScaledPair` or `Chain` | over the given weight | beside `up` | nn.Linear |
    """

    members: tuple[Member, ...]
    parametrisation: Parametrisation
    modifiers: tuple[Modifier, ...] = field(init=False, repr=False, compare=False)
    """The members that are not the parametrisation."""
    _member_with_gain: Member | None = field(init=False, repr=False, compare=False)
    """The member that sets a gain."""
    _is_amended: bool = field(init=False, repr=False, compare=False)
    """Whether the change is more than the parametrisation's own tensors make."""

    def __post_init__(self) -> None:
        # Computed here, not as cached properties: forwards read these, and torch.compile cannot
        # trace the lock of a cached property.
        modifiers = tuple(member for member in self.members if isinstance(member, Modifier))
        with_gain = (m for m in (self.parametrisation, *modifiers) if overrides(m, "gain"))
        is_amended = any(overrides(member, hook) for member in modifiers for hook in AMENDING)
        object.__setattr__(self, "modifiers", modifiers)
        object.__setattr__(self, "_member_with_gain", next(with_gain, None))
        object.__setattr__(self, "_is_amended", is_amended)

    @classmethod
    def of(cls, members: Member | Method | Iterable[Member]) -> Self:
        """Returns the method of one member or several; without a parametrisation, on plain LoRA.

        >>> from lorakin import DoRA, LoRAPlus
        >>> method = Method.of([LoRAPlus(ratio=4), DoRA(rank=8)])
        >>> method.words, method.parametrisation.rank
        ('lora+,dora', 8)

        Raises:
            SettingError: members do not combine, or their settings contradict each other.
        """
        if isinstance(members, cls):
            return members
        method = cls(*composed(members))
        for member in method.members:
            settings = {name: getattr(member, name) for name in member.setting_names()}
            check_storable(member.word, settings)
        slots = method.slots_at("", Shape(1, 1))
        for modifier in method.modifiers:
            modifier.check_pair(method.parametrisation)
            if reason := modifier.refusal_of_method(method, slots):
                raise SettingError(reason)
        return method

    # What it is.

    @property
    def words(self) -> str:
        """Its members as on the command line: `dora,lora+`."""
        return ",".join(member.word for member in self.members)

    @property
    def learning_rate(self) -> float:
        """The learning rate to use when the user gives none."""
        lr = self.parametrisation.learning_rate
        for member in self.modifiers:
            lr *= member.learning_rate_factor
        return lr

    @property
    def dropout(self) -> float:
        """Dropout of the branch's input, in train mode."""
        return self.parametrisation.dropout

    def setting(self, name: str) -> Any:
        """Returns the setting `name` of the pair, else of a member that has it, else None."""
        owners = (m for m in (self.parametrisation, *self.members) if name in m.setting_names())
        return next((getattr(m, name) for m in owners), None)

    def with_settings(self, **settings: Any) -> Method:
        """Returns the method with other settings of the pair, such as one module's rank or alpha.

        Raises:
            SettingError: single modules cannot have another value of a setting.
        """
        pair = self.parametrisation
        if unknown := [name for name in settings if name not in pair.settings_of_modules()]:
            raise SettingError(
                f"{self.words} has no {unknown[0]} of single modules, so {unknown[0]}_pattern "
                "cannot apply"
            )
        return dataclasses.replace(self, parametrisation=dataclasses.replace(pair, **settings))  # type: ignore[type-var]

    def clamped(self, shape: Shape) -> Mapping[str, int]:
        """Returns the setting that lowers the rank to what the weight allows; {} if it fits."""
        largest = min(m.largest_rank(shape) for m in (self.parametrisation, *self.modifiers))
        return self.parametrisation.clamped(largest)

    def resolved(self, total_steps: int | None) -> Method:
        """Returns the method with open settings decided for a run of `total_steps` steps.

        Raises:
            SettingError: a member does not fit such a run.
        """
        members = tuple(member.resolved(self, total_steps) for member in self.members)
        return dataclasses.replace(self, members=members)

    def agrees_with(self, other: Method, training: bool = True) -> bool:
        """Returns whether it is the same method as `other`, however spelt; see `difference`."""
        return difference(self, other, training) is None

    # What it looks at before it starts.

    @property
    def needed_probe(self) -> Probe | None:
        """The probe that a member needs before the method can be put into a model."""
        return next(
            (probe for m in self.modifiers if (probe := m.needed_probe()) is not None), None
        )

    @cached_property
    def measured_member(self) -> Modifier | None:
        """The member that starts by what is measured on data, if there is one."""
        of_data = {INPUTS, GRADIENTS}
        return next((member for member in self.modifiers if member.needs & of_data), None)

    @cached_property
    def needs(self) -> frozenset[str]:
        """What its members look at before they start, besides shapes."""
        return self.parametrisation.needs.union(*(member.needs for member in self.members))

    def with_importance(self, importance: Mapping[str, float]) -> Method:
        """Returns the method with what a probe found: path → share of the importance."""
        members = (
            m.with_importance(importance) if isinstance(m, Modifier) else m for m in self.members
        )
        return dataclasses.replace(self, members=tuple(members))

    def with_own_pair(self, paths: Sequence[str]) -> list[str]:
        """Returns those of `paths` whose pair is not shared with others."""
        for member in self.modifiers:
            paths = member.with_own_pair(paths)
        return list(paths)

    def for_probe(self) -> Method:
        """Returns what a probe trains: the members that take part, on the pair or plain LoRA."""
        pair = self.parametrisation
        if not pair.in_probe:
            settings = {name: getattr(pair, name) for name in ("rank", "alpha", "dropout")}
            pair = default_pair()(**settings)
        return Method.of([pair, *(member for member in self.modifiers if member.in_probe)])

    def bound_to(self, paths: Sequence[str]) -> tuple[Self, list[str]]:
        """Returns the method for an adapter of these modules, and which of them get a pair."""
        members = tuple(m.bound_to(paths) if isinstance(m, Modifier) else m for m in self.members)
        method = dataclasses.replace(self, members=members)
        for member in method.modifiers:
            paths = member.with_pair(paths)
        return method, list(paths)

    def check(self, shape: Shape, path: str) -> None:
        """Checks that it fits a weight of this shape, that of the module at `path`.

        Raises:
            SettingError: it does not.
        """
        pair = self.parametrisation
        require(
            pair.lookup_slots is not None or not shape.lookup,
            f"{pair.word} works on layers that multiply by their weight, but {path} is an "
            "embedding; exclude it",
        )
        pair.check(shape, path)
        for member in self.modifiers:
            member.check(shape, path, self)

    # Its tensors.

    def slots_at(self, path: str, shape: Shape) -> Slots:
        """Returns the slots of the module at `path`, also those that come while training."""
        slots = self.parametrisation.slots_at(shape)
        for member in self.modifiers:
            slots = member.amend_slots(slots, path, shape)
        return slots

    def start(
        self,
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
        generator: torch.Generator | None,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensors]:
        """Returns all modules' initial tensors by path and slot; shared ones are the same object.

        They are float32, float64 on a float64 base, or `dtype` if that is given. `methods` holds
        each module's own method.
        """
        pairs = {path: method.parametrisation for path, method in methods.items()}
        initial = self.parametrisation.start_all(modules, pairs, generator, device)
        dtypes = {path: wide_dtype(modules[path].weight.dtype) for path in initial}
        initial = cast_keeping_shared(initial, dtypes)
        for member in self.modifiers:
            initial = member.amend_start(initial, modules, methods)
        # A member may start a tensor as a view of the base weight, or expanded.
        initial = copied_keeping_shared(self.share(initial, modules, methods))
        for path, tensors in initial.items():
            check_declared(methods[path], path, modules[path].shape, tensors)
        check_finite(self, initial)
        if dtype is not None:
            initial = cast_keeping_shared(initial, dict.fromkeys(initial, dtype))
        return initial

    def share(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        """Returns all modules' tensors; modules that share a tensor hold the same object."""
        for member in self.modifiers:
            tensors = member.share(tensors, modules, methods)
        return tensors

    # What it computes.

    def low_rank(self, tensors: Mapping[str, Tensor], shape: Shape) -> Pair:
        """Returns the pair without a gain, differentiable in the tensors."""
        pair = self.parametrisation.change(tensors).pair(shape)
        for member in self.modifiers:
            pair = member.amend_pair(pair, tensors)
        for member in self.modifiers:
            pair = member.beside_pair(pair, tensors)
        return pair

    def pair(
        self, tensors: Mapping[str, Tensor], shape: Shape, weight: Tensor | FrozenWeight
    ) -> Pair:
        """Returns the pair with its gain over `weight` (outputs, inputs), differentiable.

        Pass a `FrozenWeight` that is kept between forwards: what does not change is computed once.
        """
        return self._gained(self.low_rank(tensors, shape), 1.0, tensors, weight)

    def linear_change(
        self, tensors: Mapping[str, Tensor], shape: Shape, weight: FrozenWeight
    ) -> ScaledPair | Chain:
        """Returns the change as a `Chain` if it is one and nothing else, or as `scaled_pair`."""
        change = self.parametrisation.change(tensors)
        if isinstance(change, Chain) and self.keeps_form:
            return change
        return self._scaled_pair(change, tensors, shape, weight)

    @property
    def keeps_form(self) -> bool:
        """Whether the change has the form that the parametrisation gives it."""
        return not (self._is_amended or self.has_gain)

    def scaled_pair(
        self, tensors: Mapping[str, Tensor], shape: Shape, weight: FrozenWeight
    ) -> ScaledPair:
        """Returns the pair and gain over `weight`, with the scale beside `up` where it can be."""
        return self._scaled_pair(self.parametrisation.change(tensors), tensors, shape, weight)

    def _scaled_pair(
        self,
        change: Change,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        weight: FrozenWeight,
    ) -> ScaledPair:
        if self._is_amended or not isinstance(change, LowRank):
            return ScaledPair(self.pair(tensors, shape, weight))
        pair = Pair(change.up, change.down)
        return ScaledPair(self._gained(pair, change.scale, tensors, weight), change.scale)

    def _gained(
        self, pair: Pair, scale: float, tensors: Mapping[str, Tensor], weight: Tensor | FrozenWeight
    ) -> Pair:
        """Returns the pair, with the gain of the member that sets one."""
        if self._member_with_gain is None:
            return pair
        change = ScaledPair(pair, scale)
        return pair._replace(gain=self._member_with_gain.gain(change, tensors, weight))

    @property
    def has_gain(self) -> bool:
        """Whether a member sets a gain, which depends on the weight itself."""
        return self._member_with_gain is not None

    # How it trains.

    def unmoved(self, modules: Sequence[AdaptedModule]) -> list[str]:
        """Returns which of the members' tensors training never reached, in words."""
        reasons = (member.unmoved(modules) for member in self.members)
        return [reason for reason in reasons if reason is not None]

    def rules(self, modules: Sequence[AdaptedModule]) -> list[Rule]:
        """Returns what happens at each optimizer step; call `resolved` first."""
        return [rule for member in self.members if (rule := member.rule(modules)) is not None]

    def __str__(self) -> str:
        return f"{self.words} on {self.parametrisation}"


def refusal_of_members(first: type[Member], second: type[Member]) -> str | None:
    """Returns why two members with default settings do not combine; None if they do."""
    try:
        Method.of([first(), second()])
    except SettingError as error:
        return str(error)
    return None
