"""Members together: which combine, and what a combination computes.

Every member declares the axes on which it decides something. Members that decide on different axes combine; two that
decide on the same axis do not, and the refusal quotes both declarations. So legality is data, and this file names no
member but LoRA, whose pair is everyone's default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from lorakin.errors import SettingError
from lorakin.family import agreement
from lorakin.family.lora import LoRA
from lorakin.family.member import (
    FIXED,
    AdaptedModule,
    Member,
    Modifier,
    Parametrisation,
    Probe,
    Role,
    Rule,
    Target,
)
from lorakin.family.pair import Chain, Pair, Shape, Tensors, Weight, cast_together
from lorakin.family.settings import require

AXES = {
    "parametrisation": "where the pair comes from",
    "projection": "whether its random factor trains",
    "rates": "who learns how fast",
    "budget": "where ranks go while training",
    "sharing": "which modules share a pair",
    "base": "whether the base weight moves",
    "gain": "whether each output has a trained length",
}
"""What members decide, in the order in which they act."""


@dataclass(frozen=True)
class Method:
    """Members that work together: one parametrisation and what modifies it. Made by `Method.of`.

    `members` are those the user named, in the order of their axes.
    """

    members: tuple[Member, ...]
    parametrisation: Parametrisation

    @classmethod
    def of(cls, members: Member | Method | Iterable[Member]) -> Self:
        """The method of one member or several; a pair that no member brings is plain LoRA's.

        Raises:
            SettingError: members that do not combine, or settings that contradict each other.
        """
        if isinstance(members, cls):
            return members
        several = isinstance(members, Iterable) and not isinstance(members, str | type)
        given: tuple[Any, ...] = tuple(members) if several else (members,)  # type: ignore[arg-type]
        for member in given:
            if not isinstance(member, Member):
                raise SettingError(
                    f"expected a member with its settings, such as lk.LoRA(rank=16), not {member!r}"
                )
        require(bool(given), "a method needs at least one member, such as lk.LoRA(rank=16)")
        axes = list(AXES)
        ordered = tuple(
            sorted(given, key=lambda member: min(axes.index(axis) for axis in member.decides))
        )
        for n, one in enumerate(ordered):
            for other in ordered[n + 1 :]:
                if reason := _clash(one, other):
                    raise SettingError(reason)
        modifiers = [member for member in ordered if isinstance(member, Modifier)]
        named = next((member for member in ordered if isinstance(member, Parametrisation)), None)
        kind = type(named) if named is not None else _kind(modifiers)
        for member in modifiers:
            if reason := member.misfit(kind):
                raise SettingError(f"{member.word} and {kind.word} do not combine: {reason}")
        pair = _parametrisation(named, kind, modifiers)
        method = cls(ordered, pair)
        roles = method.roles("", shape := Shape(1, 1), pair.roles(shape))
        for modifier in method.modifiers:
            modifier.check_pair(pair)
            if reason := modifier.vacuous(method, roles):
                raise SettingError(reason)
        return method

    @cached_property
    def modifiers(self) -> tuple[Modifier, ...]:
        """The members that are not the parametrisation."""
        return tuple(member for member in self.members if isinstance(member, Modifier))

    @property
    def words(self) -> str:
        """As on the command line: `dora,lora+`."""
        return ",".join(member.word for member in self.members)

    @property
    def learning_rate(self) -> float:
        """What to take when the user gives none."""
        lr = self.parametrisation.learning_rate
        for member in self.modifiers:
            lr *= member.learning_rate_factor
        return lr

    @property
    def dropout(self) -> float:
        """Of the branch's input, in train mode."""
        return self.parametrisation.dropout

    def setting(self, name: str) -> Any:
        """The setting `name` of the pair, or else of the first member that has one of that name; None if there is none."""
        owners = (m for m in (self.parametrisation, *self.members) if name in m.setting_names())
        return next((getattr(m, name) for m in owners), None)

    def at(self, **settings: Any) -> Method:
        """The method of one module, with a rank or an alpha of its own."""
        if unknown := [name for name in settings if name not in self.parametrisation.per_module]:
            raise SettingError(
                f"{self.words} takes no {unknown[0]} for single modules, so {unknown[0]}_pattern cannot apply"
            )
        return dataclasses.replace(
            self,
            parametrisation=dataclasses.replace(self.parametrisation, **settings),  # type: ignore[type-var]
        )

    def resolved(self, total_steps: int | None) -> Method:
        """With settings left open decided for a run of so many steps.

        Raises:
            SettingError: a member cannot be run like that.
        """
        return dataclasses.replace(
            self, members=tuple(member.resolved(self, total_steps) for member in self.members)
        )

    def agrees_with(self, other: Method, training: bool = True) -> bool:
        """Whether it is `other`, however that is spelt, but for settings that one of them leaves open; see `agreement`."""
        return agreement.are_one(self, other, training)

    @property
    def probe(self) -> Probe | None:
        """The probe that a member still needs before the method can be put into a model."""
        return next(
            (probe for member in self.modifiers if (probe := member.probe()) is not None), None
        )

    def with_importance(self, importance: Mapping[str, float]) -> Method:
        """The method with what a probe found: path → share of the importance."""
        known = tuple(
            m.with_importance(importance) if isinstance(m, Modifier) else m for m in self.members
        )
        return dataclasses.replace(self, members=known)

    def own_pairs(self, paths: Sequence[str]) -> list[str]:
        """Those of `paths` whose pair is theirs alone."""
        for member in self.modifiers:
            paths = member.own_pairs(paths)
        return list(paths)

    def for_probe(self) -> Method:
        """What a probe trains before this method does: the members that take part in one, on the pair or plain LoRA like it."""
        pair = self.parametrisation
        if not pair.in_probe:
            pair = LoRA(**{name: getattr(pair, name) for name in ("rank", "alpha", "dropout")})
        return Method.of([pair, *(member for member in self.modifiers if member.in_probe)])

    def select(self, paths: Sequence[str]) -> tuple[Self, list[str]]:
        """The method for an adapter with these targets, and which of them get a pair."""
        known = tuple(m.among(paths) if isinstance(m, Modifier) else m for m in self.members)
        method = dataclasses.replace(self, members=known)
        for member in method.modifiers:
            paths = member.select(paths)
        return method, list(paths)

    def check(self, shape: Shape, where: str) -> None:
        """Raise `SettingError` if the method does not fit a weight of this shape; `where` is the module's path."""
        self.parametrisation.check(shape, where)

    def start(
        self,
        targets: Mapping[str, Target],
        methods: Mapping[str, Method],
        generator: torch.Generator | None,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensors]:
        """The tensors of all modules at the start, by path and slot; shared ones are the same object.

        They are float32, float64 on a float64 base, unless `dtype` says otherwise. `methods` has each module's own.
        """
        each = {path: method.parametrisation for path, method in methods.items()}
        drawn = self.parametrisation.start_all(targets, each, generator, device)
        wide = {
            path: torch.promote_types(targets[path].weight.dtype, torch.float32) for path in drawn
        }
        drawn = cast_together(drawn, wide)
        for member in self.modifiers:
            drawn = member.extend(drawn, targets, methods)
        shared = self.share(drawn, targets, methods)
        return shared if dtype is None else cast_together(shared, dict.fromkeys(shared, dtype))

    def share(
        self,
        tensors: dict[str, Tensors],
        targets: Mapping[str, Target],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        """All modules' tensors, with one object wherever modules share a tensor."""
        for member in self.modifiers:
            tensors = member.share(tensors, targets, methods)
        return tensors

    def roles(self, path: str, shape: Shape, slots: Iterable[str]) -> dict[str, Role]:
        """What each of a module's tensors is to an optimizer."""
        pair = self.parametrisation
        known = pair.roles(shape)
        roles = {slot: FIXED if slot in pair.frozen else known.get(slot, Role()) for slot in slots}
        for member in self.modifiers:
            roles = member.amend_roles(roles, path, shape, pair)
        return roles

    def low_rank(self, tensors: Mapping[str, Tensor], shape: Shape) -> Pair:
        """The pair without a gain, differentiable in the tensors."""
        pair = self.parametrisation.pair(tensors, shape)
        for member in self.modifiers:
            pair = member.amend_pair(pair, tensors)
        return pair

    def chain(self, tensors: Mapping[str, Tensor]) -> Chain | None:
        """The pair as frozen matrices between trained vectors, if it is that and no member makes something else of it."""
        return (
            None
            if self._that_have("amend_pair") or self._that_have("gain")
            else self.parametrisation.chain(tensors)
        )

    def pair(self, tensors: Mapping[str, Tensor], shape: Shape, weight: Tensor | Weight) -> Pair:
        """The pair and its gain over `weight` (outputs, inputs), differentiable in the tensors.

        A `Weight` that is kept between forwards saves what does not change.
        """
        pair = self.low_rank(tensors, shape)
        for member in self.modifiers:
            gain = member.gain(pair, tensors, weight)
            pair = pair if gain is None else pair._replace(gain=gain)
        return pair

    def factors(
        self, tensors: Mapping[str, Tensor], shape: Shape, weight: Weight
    ) -> tuple[Pair, float]:
        """The pair and its gain over `weight` before the scale is in `up`, and the scale."""
        if self._that_have("amend_pair"):
            return self.pair(tensors, shape, weight), 1.0
        pair, scale = self.parametrisation.factors(tensors, shape)
        for member in self._that_have("gain"):
            whole = pair._replace(up=scale * pair.up.detach())
            pair = pair._replace(gain=member.gain(whole, tensors, weight))
        return pair, scale

    @cached_property
    def gains(self) -> bool:
        """Whether a member has a gain over the pair, for which the weight itself counts."""
        return bool(self._that_have("gain"))

    def _that_have(self, hook: str) -> list[Modifier]:
        """The modifiers with an own method of this name, not `Modifier`'s that does nothing."""
        return [
            member
            for member in self.modifiers
            if getattr(type(member), hook) is not getattr(Modifier, hook)
        ]

    def rate(self, lr: float, role: Role, shape: Shape) -> float:
        """The learning rate of a tensor, given the base rate."""
        for member in self.modifiers:
            lr = member.rate(lr, role, shape)
        return lr

    def unmoved(self, places: Sequence[AdaptedModule]) -> list[str]:
        """What of the members training never reached."""
        return [reason for member in self.members if (reason := member.unmoved(places)) is not None]

    def rules(self, places: Sequence[AdaptedModule]) -> list[Rule]:
        """What happens at each optimizer step; call `resolved` first."""
        return [rule for member in self.members if (rule := member.rule(places)) is not None]

    def __str__(self) -> str:
        return f"{self.words} on {self.parametrisation}"


def conflict(one: type[Member], other: type[Member]) -> str | None:
    """Why two members, with their default settings, do not combine; None if they do."""
    try:
        Method.of([one(), other()])
    except SettingError as error:
        return str(error)
    return None


def _clash(one: Member, other: Member) -> str | None:
    """Why two members do not combine, as far as their declarations say."""
    for axis in one.decides.keys() & other.decides.keys():
        if one.word == other.word:
            return f"{one.word} is given twice; give it once, with all its settings"
        return (
            f"{one.word} and {other.word} do not combine: both decide {AXES[axis]} "
            f"({one.word}: {one.decides[axis]}; {other.word}: {other.decides[axis]})"
        )
    return None


def _pair_settings(modifiers: Sequence[Modifier]) -> dict[str, Any]:
    """What the modifiers say about the pair they share."""
    said: dict[str, tuple[Any, str]] = {}
    for member in modifiers:
        for name in member.pair_settings:
            value = getattr(member, name)
            if value is None:
                continue
            if name in said and said[name][0] != value:
                raise SettingError(
                    f"{said[name][1]} has {name}={said[name][0]!r} and {member.word} has {name}={value!r}, but they share one "
                    "pair; give it once"
                )
            said[name] = (value, member.word)
    return {name: value for name, (value, _) in said.items()}


def _kind(modifiers: Sequence[Modifier]) -> type[Parametrisation]:
    """The parametrisation that a modifier needs, else plain LoRA."""
    return next(
        (kind for modifier in modifiers if (kind := modifier.default_pair()) is not None), LoRA
    )


def _parametrisation(
    named: Parametrisation | None, kind: type[Parametrisation], modifiers: Sequence[Modifier]
) -> Parametrisation:
    """The one that is named, or one of this kind, with what the modifiers say about it."""
    settings = _pair_settings(modifiers)
    known = kind.setting_names()
    if unknown := [name for name in settings if name not in known and settings[name]]:
        raise SettingError(
            f"{kind.word} has no {unknown[0]}, so {unknown[0]}={settings[unknown[0]]!r} cannot apply"
        )
    settings = {name: value for name, value in settings.items() if name in known}
    if named is None:
        defaults = {
            name: value
            for m in modifiers
            for name, value in m.pair_defaults.items()
            if name in known
        }
        return kind(**(defaults | settings))
    for name, value in settings.items():
        if value != getattr(named, name):
            raise SettingError(
                f"{named.word} has {name}={getattr(named, name)!r}, but another member says {name}={value!r}; give it to "
                f"{named.word} alone"
            )
    return named
