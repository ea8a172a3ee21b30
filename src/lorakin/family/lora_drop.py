"""LoRA-drop: a short probe shows which modules matter most; only they keep a pair of their own.

Paper:    "LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation",
          arXiv 2402.07721.
Forward:  the pair's
Shapes:   the pair's; with `rest="shared"` one pair serves all other modules of one kind
Trains:   r · (in + out) parameters for each chosen module and each shared pair
Start:    the pair's, drawn again after the probe
Probe:    train a plain pair on a small sample. Then, in eval mode, for each adapted module k, over
          all unmasked tokens x:

              g_k = Σ_x ‖s · B_k A_k x‖²,      I_k = g_k / Σ_j g_j           (`importance`)

Choose:   by descending I, the shortest prefix whose shares sum to `threshold`, or the first `keep`.
          Ties keep the model's order.
Rest:     `shared`: one trained pair for each kind (same name, same shape), its gradient the sum
          over its modules; `frozen`: a pair that never trains and stays zero; `none`: no pair
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from lorakin.errors import LorakinWarning, SettingError
from lorakin.family.measure import UnadaptedModule
from lorakin.family.member import Member, Modifier
from lorakin.family.pair import Shape, Tensors
from lorakin.family.probe import Probe
from lorakin.family.settings import is_finite_number, one_of, require, to_number, to_whole_number
from lorakin.family.slots import Slots, frozen

if TYPE_CHECKING:
    from lorakin.family.method import Method


@dataclass(frozen=True, kw_only=True)
class LoRADrop(Modifier):
    """LoRA-drop: modules that matter less share one pair.

    >>> import torch, lorakin as lk
    >>> model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(3)))
    >>> found = {"0": 0.7, "1": 0.2, "2": 0.1}
    >>> method = lk.LoRADrop(rank=2, keep=1, rest="none", importance=found)
    >>> list(lk.adapt(model, method, list(found)).placement.methods)
    ['0']

    Args:
        threshold: the share of all importance that the chosen modules reach together, in (0, 1];
            0.9 unless `keep` is given.
        keep: how many modules to choose instead.
        rest: what the other modules get: `shared`, `frozen` or `none`.
        sample: the share of the data that the probe trains on.
        probe_epochs: how often the probe sees it.
        normalised: divide g_k by Σ ‖W0 x‖² first; for modules of different kinds.
        importance: path → I, a number ≥ 0 for every adapted module; scaled to sum to 1. If it is
            not given, a probe finds it (`lorakin train`, or `adapt(…, probe=batches)`).

    Raises:
        SettingError: a value is outside its range.
    """

    word: ClassVar[str] = "lora-drop"
    paper: ClassVar[str] = (
        "LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation, arXiv 2402.07721"
    )
    decides: ClassVar[Mapping[str, str]] = {"sharing": "modules that matter less share one pair"}
    in_probe: ClassVar[bool] = False
    test_settings: ClassVar[Mapping[str, Any]] = {"keep": 3}

    threshold: float | None = None
    keep: int | None = None
    rest: Literal["shared", "frozen", "none"] = "shared"
    sample: float = 0.1
    probe_epochs: int = 3
    normalised: bool = False
    importance: Mapping[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.threshold is None or self.keep is None, "give threshold or keep, not both")
        if self.threshold is None and self.keep is None:
            object.__setattr__(self, "threshold", 0.9)
        to_number(
            self, "threshold", lambda share: 0 < share <= 1, "a number in (0, 1]", optional=True
        )
        to_whole_number(self, "keep", at_least=1, optional=True)
        one_of(self, "rest", ("shared", "frozen", "none"))
        to_number(self, "sample", lambda share: 0 < share <= 1, "a number in (0, 1]")
        to_whole_number(self, "probe_epochs", at_least=1)
        given = self.importance
        require(
            given is None or _is_importance(given),
            "importance must map modules' paths to finite numbers ≥ 0, at least one above 0, not "
            f"{str(given)[:80]}",
        )
        require(
            isinstance(self.normalised, bool),
            f"normalised must be True or False, not {self.normalised!r}",
        )

    def refusal_of_method(self, method: Method, slots: Slots) -> str | None:
        members = (method.parametrisation, *method.members)
        word = next((member.word for member in members if _starts_by_module(member)), None)
        if self.rest == "shared" and word is not None:
            return (
                f"lora-drop with rest='shared' and {word} do not combine: {word} starts each pair "
                "from its own module, so modules cannot share one; give rest='frozen' or "
                "rest='none'"
            )
        return None

    def needed_probe(self) -> Probe | None:
        if self.importance is not None:
            return None
        return Probe(self.sample, self.probe_epochs, self.normalised)

    def with_importance(self, importance: Mapping[str, float]) -> Self:
        return dataclasses.replace(self, importance=dict(importance))

    def bound_to(self, paths: Sequence[str]) -> Self:
        """Returns a copy with the importance of these modules alone, as shares that sum to 1."""
        if self.importance is None:
            return self
        if unknown := [path for path in paths if path not in self.importance]:
            raise SettingError(
                f"lora-drop's importance has no entry for {unknown[0]}; probe the targets that you "
                "adapt"
            )
        importance = {path: self.importance[path] for path in paths}
        total = math.fsum(importance.values())
        require(
            total > 0,
            f"lora-drop's importance is 0 for all {len(paths)} adapted modules, so it cannot "
            "choose",
        )
        if others := list(self.importance.keys() - set(paths)):
            warnings.warn(
                f"lora-drop: importance also names {len(others)} modules that are not targets "
                f"({min(others)}, …); it ignores them and takes shares of the {len(paths)} targets",
                LorakinWarning,
                stacklevel=2,
            )
        # The shares that a probe found keep their bits, which files hold.
        if abs(total - 1) > 1e-9:
            importance = {path: value / total for path, value in importance.items()}
        return self.with_importance(importance)

    def most_important(self) -> list[str]:
        """Returns the paths that keep a pair of their own, most important first."""
        assert self.importance is not None
        ranked = sorted(self.importance, key=lambda path: -self.importance[path])  # type: ignore[index]
        if self.keep is not None:
            return ranked[: self.keep]
        assert self.threshold is not None
        count, total = 0, 0.0
        while count < len(ranked) and total < self.threshold - 1e-12:
            total += self.importance[ranked[count]]
            count += 1
        return ranked[:count]

    def with_own_pair(self, paths: Sequence[str]) -> list[str]:
        kept = set(self.most_important())
        return [path for path in paths if path in kept]

    def with_pair(self, paths: Sequence[str]) -> list[str]:
        require(
            self.importance is not None,
            "lora-drop needs a probe to choose modules: call adapt(…, probe=batches), or give "
            "LoRADrop(importance=…) what lk.importance returns",
        )
        assert self.importance is not None
        values = [self.importance[path] for path in paths]
        if len(values) > 1 and max(values) - min(values) <= 1e-9 * max(values):
            warnings.warn(
                "lora-drop: all modules are equally important, so their order alone decides; was "
                "the probe trained?",
                LorakinWarning,
                stacklevel=2,
            )
        kept = set(self.most_important())
        if all(path in kept for path in paths):
            warnings.warn(
                f"lora-drop chose all {len(paths)} modules, so none share a pair; lower threshold "
                "or keep",
                LorakinWarning,
                stacklevel=2,
            )
        return [path for path in paths if path in kept] if self.rest == "none" else list(paths)

    def share(
        self,
        tensors: dict[str, Tensors],
        modules: Mapping[str, UnadaptedModule],
        methods: Mapping[str, Method],
    ) -> dict[str, Tensors]:
        kept = set(self.most_important())
        first: dict[object, Tensors] = {}
        shared = dict(tensors)
        for path, of_module in tensors.items():
            if path in kept:
                continue
            method, shape = methods[path], modules[path].shape
            slots = method.slots_at(path, shape)
            kind = (path.rpartition(".")[2], shape, method.parametrisation)
            of_first = first.setdefault(kind, of_module)
            pair = {slot: t for slot, t in of_first.items() if slots[slot].belongs_to_pair}
            shared[path] = of_module | pair
        return shared

    def amend_slots(self, slots: Slots, path: str, shape: Shape) -> Slots:
        freezes_rest = self.rest == "frozen" and self.importance is not None
        return frozen(slots) if freezes_rest and path not in self.most_important() else slots


def _starts_by_module(member: Member) -> bool:
    """Returns whether a member starts a pair from its module's weight or data."""
    of_pair = (
        any(slot.belongs_to_pair for slot in member.slots.values()) or "start" in member.decides
    )
    return bool(member.needs) and of_pair


def _is_importance(given: object) -> bool:
    """Returns whether it maps paths to finite numbers ≥ 0, at least one of them above 0."""
    return (
        isinstance(given, Mapping)
        and all(isinstance(path, str) for path in given)
        and all(is_finite_number(share) and share >= 0 for share in given.values())
        and any(given.values())
    )
