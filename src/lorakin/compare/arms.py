"""The arms of a comparison: each method at one fair size, and the controls without which no difference means much."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorakin.errors import LorakinError, SettingError
from lorakin.family import FAMILY, Method, members, method_named
from lorakin.family.words import fair_settings, given_to

PLAIN = FAMILY[0].word
"""The method that all others are measured against."""
REFERENCE, MEMBER, CONTROL, LIMIT = "reference", "member", "control", "limit"
"""Kinds of arms: plain LoRA; the other methods; what explains a difference; what no training and whole training reach."""
BASE, FULL, HEAD = "base", "full", "head"
"""The limits' names."""
LARGEST_RANK = 4096


@dataclasses.dataclass(frozen=True)
class Arm:
    """One thing that is compared, tuned like every other.

    `name` is for files and `title` for people; `about` says why the arm is there. `words` is the method, as `dora,lora+`,
    taken at `rank` and `scaling` (see `Member.fair`) unless `given` says otherwise; `recipe` has fields of the recipe other
    than all arms' own. A control `explains` the arm of that name. The sweep begins at `lr`, which is
    None where nothing trains. `refused` is why it cannot run, if so.
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
        """The method's settings in a run of so many steps."""
        return fair_settings(self.words, self.rank, self.scaling, steps) | dict(self.given)

    def method(self, steps: int) -> Method:
        """The method in a run of so many steps.

        Raises:
            SettingError: settings that it does not have, or with which it cannot run.
        """
        method = method_named(self.words, self.settings(steps))
        method.resolved(steps)
        return method

    def sized(self, parameters: Callable[[Method], int], most: int, steps: int) -> Arm:
        """The same at the largest rank at which `parameters` counts at most `most`; refused if there is none."""
        one, two = (dataclasses.replace(self, rank=rank).settings(steps) for rank in (1, 2))
        direct = one == two  # its fair size has no rank, so that it is given as a setting

        def at(rank: int) -> Arm:
            return dataclasses.replace(
                self, **({"given": {**self.given, "rank": rank}} if direct else {"rank": rank})
            )

        def count(rank: int) -> float:
            try:
                return parameters(at(rank).method(steps))
            except SettingError:
                return math.inf  # more ranks than a weight has

        if count(1) > most:
            reason = (
                f"at rank 1 it trains {count(1):,} numbers, more than the {most:,} of the budget"
            )
            return dataclasses.replace(at(1), refused=reason)
        low, high = 1, LARGEST_RANK + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle) <= most else (low, middle)
        return at(low)


def arms_of(
    methods: Sequence[str],
    size: tuple[int, float],
    steps: int,
    given: Mapping[str, Any],
    dropout: float,
) -> list[Arm]:
    """Plain LoRA, the methods, and the controls that they call for; those that cannot be run are refused with the reason.

    Args:
        methods: the words of each.
        size: rank and scale (see `Member.fair`).
        steps: of a run.
        given: settings, for whichever methods have them.
        dropout: likewise, for those that can have it.

    Raises:
        SettingError: a setting that none of the methods has.
    """
    words = [PLAIN, *(word for word in methods if word != PLAIN)]
    arms = [
        _built(Arm(
            name=word, title=word, kind=REFERENCE if word == PLAIN else MEMBER, words=word, rank=size[0], scaling=size[1],
            given=own,
        ), steps, dropout)
        for word, own in given_to(words, given).items()
    ]  # fmt: skip
    return arms + list(_controls(arms, steps, dropout))


def _built(arm: Arm, steps: int, dropout: float) -> Arm:
    """The arm with its usual learning rate, with dropout if it can, or refused with the reason."""

    def tried(candidate: Arm) -> Arm:
        try:
            return dataclasses.replace(candidate, lr=candidate.method(steps).learning_rate)
        except LorakinError as error:
            return dataclasses.replace(candidate, refused=str(error))

    dropped = (
        tried(dataclasses.replace(arm, given={**arm.given, "dropout": dropout}))
        if dropout
        else tried(arm)
    )
    if not dropout or not dropped.refused:
        return dropped
    return tried(dataclasses.replace(arm, about=f"without dropout: {dropped.refused}"))


def _controls(arms: Sequence[Arm], steps: int, dropout: float) -> Iterator[Arm]:
    """What some arms are by theory, as arms of their own; and plain LoRA without dropout, if others have it."""
    made: dict[tuple[str, float], Arm] = {}
    for arm in arms:
        if arm.refused:
            continue
        method = arm.method(steps)
        factor = math.prod(member.alpha_factor for member in method.members)
        alpha, pair = method.setting("alpha"), method.parametrisation.word
        rest = (
            ",".join(member.word for member in method.members if member.alpha_factor == 1) or pair
        )
        if (
            factor == 1
            or alpha is None
            or rest not in {member.word for member in members()} | {arm.words for arm in arms}
        ):
            continue
        if (rest, alpha * factor) in made:
            continue
        scaled = dataclasses.replace(
            arm, name=f"{rest}-alpha-x{factor:g}", title=f"{rest}, alpha × {factor:g}", kind=CONTROL, words=rest,
            given={"alpha": alpha * factor}, explains=arm.name, about=f"what {arm.title} is under Adam, by theory",
        )  # fmt: skip
        made[rest, alpha * factor] = _built(scaled, steps, 0.0 if method.dropout == 0 else dropout)
    yield from made.values()
    if dropout:
        yield dataclasses.replace(
            arms[0], name=f"{PLAIN}-no-dropout", title=f"{PLAIN}, no dropout", kind=CONTROL,
            given={**arms[0].given, "dropout": 0.0}, about="what methods that take no dropout are to be compared with",
        )  # fmt: skip


def limits_of(reference: Arm, adapted: Sequence[str], classifier: bool) -> list[Arm]:
    """The untrained base; a classifier's new head alone; and the adapted layers, whose paths are `adapted`, trained whole."""
    base = dataclasses.replace(reference, kind=LIMIT, given={}, about="")
    limits = [
        dataclasses.replace(
            base, name=BASE, title="base model", lr=None, about="nothing is trained"
        )
    ]
    if classifier:
        about = "the new head is trained, the model under it is not"
        limits.append(
            dataclasses.replace(
                base, name=HEAD, title="head alone", recipe={"targets": ["none"]}, about=about
            )
        )
    assert reference.lr is not None
    whole = dataclasses.replace(
        base, name=FULL, title="full fine-tuning", lr=reference.lr / 10,
        recipe={"targets": ["none"], "modules_to_save": list(adapted), "dtype": "float32"},
        about="every adapted layer is trained whole, in float32; norms, embeddings and a language model's head stay",
    )  # fmt: skip
    return [*limits, whole]
