"""How strongly an adapter acts: a factor on its change that is set at run time.

    W = W0 + scale · (W_adapter − W0)

Every path computes its output from the pair that a branch gives. So the branch scales its pair
(`Pair.times`), and no path needs to know the scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakin.errors import SettingError, StateError
from lorakin.family.settings import is_finite_number
from lorakin.inject import quantised
from lorakin.inject.adapted import module_at
from lorakin.inject.attachments import attachments_of
from lorakin.inject.folding import set_merged

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter


def rescale(adapter: InsertedAdapter, scale: float) -> float:
    """Scales the adapter on all of its modules, merged ones too; returns the scale as a float.

    Raises:
        SettingError: `scale` is not a finite number.
        StateError: the adapter has moved base weights in place, or a merged weight would not be
            finite. Nothing is changed then.
    """
    if not is_finite_number(scale):
        raise SettingError(
            f"an adapter's scale must be a finite number, such as 0.5, not {scale!r}"
        )
    if scale != 1 and adapter.effect.has_moved_base:
        raise StateError(
            f"adapter {adapter.name!r} has moved the base weights in place, which a scale does not "
            "reach; save and load it (files hold the form that leaves the base alone), then set "
            "the scale"
        )
    before = adapter.effect.scale
    try:
        _set(adapter, float(scale))
    except BaseException:
        _set(adapter, before)
        raise
    return float(scale)


def _set(adapter: InsertedAdapter, scale: float) -> None:
    """Scales every branch, and computes the merged weights again."""
    for path in adapter.placement.methods:
        adapter.tensors.branch(path).rescale(scale)
    dtype = quantised.dtype_of(adapter.model)
    for path in adapter.placement.methods:
        module = module_at(adapter.model, path)
        if adapter.name in (merged := attachments_of(module).merged):
            set_merged(module, path, merged, dtype)
