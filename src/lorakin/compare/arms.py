"""The arms of a comparison: each method at a fair size, controls, and limits."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorakin.errors import LorakinError, SettingError
from lorakin.family import FAMILY, Method, members, method_named
from lorakin.family.method_words import fair_settings, settings_by_method

PLAIN = FAMILY[0].word
"""The method that all others are measured against: plain LoRA."""
REFERENCE, MEMBER, CONTROL, LIMIT = "reference", "member", "control", "limit"
"""Kinds of arms: plain LoRA; the other methods; arms that explain a difference; and the two limits,
no training and full fine-tuning."""
BASE, FULL, HEAD = "base", "full", "head"
"""Names of the limits."""
LARGEST_RANK = 4096


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method with its settings, or a limit, that is compared with the others.

    Attributes:
        name: the name in files.
        title: the name that people see.
        kind: `REFERENCE`, `MEMBER`, `CONTROL` or `LIMIT`.
        words: the method, such as `dora,lora+`.
        rank: the rank of the plain LoRA that it is compared with.
        scaling: alpha / rank of that plain LoRA.
        given: settings that replace those of `Member.comparable_settings`.
        recipe: fields of the recipe that differ from the other arms'.
        about: why the arm takes part.
        explains: for a control, the name of the arm that it explains.
        lr: the method's usual learning rate, where its sweep begins; None if nothing trains.
        refused: why the arm cannot run; empty if it can.
    """

    name: str
    title: str
    kind: str
    words: str
    rank: int
    scaling: float
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    about: str = ""
    explains: str = ""
    lr: float | None = None
    refused: str = ""

    def settings(self, steps: int) -> dict[str, Any]:
        """Returns the method's settings for a run of `steps` steps.

        >>> Arm("lora", "lora", REFERENCE, "lora", rank=8, scaling=2.0).settings(100)
        {'rank': 8, 'alpha': 16.0}
        """
        return fair_settings(self.words, self.rank, self.scaling, steps) | dict(self.given)

    def method(self, steps: int) -> Method:
        """Returns the method for a run of `steps` steps.

        Raises:
            SettingError: the method lacks a setting, or cannot run with these.
        """
        method = method_named(self.words, self.settings(steps))
        method.resolved(steps)
        return method

    def sized(self, parameters: Callable[[Method], int], most: int, steps: int) -> Arm:
        """Returns the arm at the largest rank that trains at most `most` parameters.

        The arm is refused if even rank 1 trains more.

        Args:
            parameters: returns the number of parameters that a method trains.
            most: the most parameters that the budget allows.
            steps: the steps of a run.
        """
        one, two = (dataclasses.replace(self, rank=rank).settings(steps) for rank in (1, 2))
        # Where `Member.comparable_settings` ignores the rank, the method gets it as a setting.
        by_setting = one == two

        def at_rank(rank: int) -> Arm:
            if by_setting:
                return dataclasses.replace(self, given={**self.given, "rank": rank})
            return dataclasses.replace(self, rank=rank)

        def count(rank: int) -> float:
            try:
                return parameters(at_rank(rank).method(steps))
            except SettingError:  # a rank above the smaller side of a weight
                return math.inf

        largest = bisect.bisect_right(range(1, LARGEST_RANK + 1), float(most), key=count)
        if largest:
            return at_rank(largest)
        refused = (
            f"at rank 1 it trains {count(1):,} parameters, more than the {most:,} of the budget"
        )
        return dataclasses.replace(at_rank(1), refused=refused)


def arms_of(
    methods: Sequence[str],
    size: tuple[int, float],
    steps: int,
    given: Mapping[str, Any],
    dropout: float,
) -> list[Arm]:
    """Returns the arms of plain LoRA, of the methods, and of the controls that these call for.

    An arm that cannot run is in the list too; its `refused` says why.

    >>> [arm.name for arm in arms_of(["lora+"], (8, 2.0), steps=100, given={}, dropout=0.0)]
    ['lora', 'lora+', 'lora-alpha-x16']

    Args:
        methods: the words of each method.
        size: rank and alpha / rank of plain LoRA (see `Member.comparable_settings`).
        steps: the steps of a run.
        given: settings; each goes to the methods that have it.
        dropout: for the methods that can have dropout.

    Raises:
        SettingError: none of the methods has a setting of that name.
    """
    methods = [PLAIN, *(words for words in methods if words != PLAIN)]
    arms = []
    for words, settings in settings_by_method(methods, given).items():
        kind = REFERENCE if words == PLAIN else MEMBER
        arm = Arm(words, words, kind, words, *size, given=settings)
        arms.append(_with_rate_and_dropout(arm, steps, dropout))
    return arms + list(_controls(arms, steps, dropout))


def _with_rate_and_dropout(arm: Arm, steps: int, dropout: float) -> Arm:
    """Adds the method's usual learning rate, and dropout if the method takes it; or refuses it."""

    def with_rate(candidate: Arm) -> Arm:
        try:
            return dataclasses.replace(candidate, lr=candidate.method(steps).learning_rate)
        except LorakinError as error:
            return dataclasses.replace(candidate, refused=str(error))

    if not dropout:
        return with_rate(arm)
    with_dropout = with_rate(dataclasses.replace(arm, given={**arm.given, "dropout": dropout}))
    if not with_dropout.refused:
        return with_dropout
    return with_rate(dataclasses.replace(arm, about=f"without dropout: {with_dropout.refused}"))


def _controls(arms: Sequence[Arm], steps: int, dropout: float) -> Iterator[Arm]:
    """Yields a control for each arm that in theory equals another method with another alpha.

    If the arms have dropout, plain LoRA without dropout is one more.
    """
    controls: dict[tuple[str, float], Arm] = {}
    for arm in arms:
        equal = None if arm.refused else _same_in_theory(arm, arms, steps)
        if equal is None or equal in controls:
            continue
        words, factor = equal
        method = arm.method(steps)
        control = Arm(
            name=f"{words}-alpha-x{factor:g}",
            title=f"{words}, alpha × {factor:g}",
            kind=CONTROL,
            words=words,
            rank=arm.rank,
            scaling=arm.scaling,
            given={"alpha": method.setting("alpha") * factor},
            explains=arm.name,
            about=f"in theory the same as {arm.title} under Adam",
        )
        control_dropout = 0.0 if method.dropout == 0 else dropout
        controls[equal] = _with_rate_and_dropout(control, steps, control_dropout)
    yield from controls.values()

    if dropout:
        yield dataclasses.replace(
            arms[0],
            name=f"{PLAIN}-no-dropout",
            title=f"{PLAIN}, no dropout",
            kind=CONTROL,
            given={**arms[0].given, "dropout": 0.0},
            about="for comparison with the methods that take no dropout",
        )


def _same_in_theory(arm: Arm, arms: Sequence[Arm], steps: int) -> tuple[str, float] | None:
    """Returns the method, and the factor of its alpha, that the arm equals under Adam in theory."""
    method = arm.method(steps)
    factor = math.prod(member.alpha_factor for member in method.members)
    others = [member.word for member in method.members if member.alpha_factor == 1]
    words = ",".join(others) or method.parametrisation.word
    methods = {member.word for member in members()} | {other.words for other in arms}
    if factor == 1 or method.setting("alpha") is None or words not in methods:
        return None
    return words, factor


def limits_of(reference: Arm, adapted: Sequence[str], classifier: bool) -> list[Arm]:
    """Returns the arms of the untrained base, of a classifier's head alone, of full fine-tuning.

    Args:
        reference: the arm of plain LoRA.
        adapted: the paths of the adapted modules, which full fine-tuning trains.
        classifier: whether the model has a new head.
    """
    base = dataclasses.replace(reference, kind=LIMIT, given={}, about="")
    limits = [
        dataclasses.replace(
            base, name=BASE, title="base model", lr=None, about="nothing is trained"
        )
    ]
    if classifier:
        limits.append(
            dataclasses.replace(
                base,
                name=HEAD,
                title="head alone",
                recipe={"targets": ["none"]},
                about="only the new head is trained",
            )
        )
    assert reference.lr is not None
    full = dataclasses.replace(
        base,
        name=FULL,
        title="full fine-tuning",
        lr=reference.lr / 10,
        recipe={"targets": ["none"], "modules_to_save": list(adapted), "dtype": "float32"},
        about="all adapted modules are trained whole in float32; norms, embeddings and a "
        "language model's head are not",
    )
    return [*limits, full]
