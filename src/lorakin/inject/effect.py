"""How adapters take part in their model: switched off, scaled, merged and unmerged."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lorakin.errors import LorakinWarning, SettingError, StateError
from lorakin.inject import quantised
from lorakin.inject.adapted import exchange_moved_weight, is_adapted, module_at
from lorakin.inject.biases import check_biases_apart, tie_merged
from lorakin.inject.folding import check_for_good, check_together, move_adapters, set_merged
from lorakin.inject.model_registry import NO_ADAPTERS, attachments_in, registry_of, watch_modules
from lorakin.inject.part import Part, attachments_at
from lorakin.inject.placement import Placement
from lorakin.inject.scale import rescaled
from lorakin.inject.threads import alone, changing, spoil
from lorakin.inject.ties import Ties
from lorakin.inject.trainable_tokens import keep_ties, places_of

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter


class Effect(Part):
    """How an adapter takes part: in use or off, how strongly, beside the weights or merged."""

    def __init__(self, adapter: InsertedAdapter) -> None:
        super().__init__(adapter)
        self._scale = 1.0
        self._disabled = 0
        self._merge_again = False

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is folded into the weights."""
        return any(
            self.name in attachments_at(self.model, path).merged
            for path in self.adapter.tensors.paths()
        )

    @property
    def is_active(self) -> bool:
        """Whether the adapter takes part in the forward."""
        return any(
            self.name in attachments_at(self.model, path).active
            for path in self.adapter.tensors.paths()
        )

    @property
    def is_off(self) -> bool:
        """Whether it is disabled at the moment."""
        return self._disabled > 0

    @property
    def scale(self) -> float:
        """How many times its change the adapter makes: 1 at first, 0 is none; any number.

        W = W0 + scale · (the adapter's weight − W0), in every adapted module, also where a gain is
        part of the change; for inference, training and merging. Modules trained whole are used as
        they are.
        It is of this model in memory: files do not hold it. Setting it on a merged adapter merges
            anew.

        Raises, when it is set:
            SettingError: no finite number.
            StateError: inside `mixed_batch`, or the adapter has moved the base weights in place.
        """
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        with changing(self.model):
            self._rescale(scale)

    def _rescale(self, scale: float) -> None:
        self.adapter.require_present()
        check_no_mixed_batch(self.model, "scaled")
        with _ties_kept(self.model) if self.is_merged else contextlib.nullcontext():
            self._scale = rescaled(self.adapter, scale)

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Inside, the adapter's scale is this one; behind it, what it was before. See `scale`."""
        before, self.scale = self._scale, scale
        try:
            yield
        finally:
            with changing(self.model, refused=False):
                if self.adapter.is_present:
                    spoil(self.model)
                    self._rescale(before)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Leave the adapter out inside a `with` block, also while it is merged. Blocks nest."""
        self._turn_off()
        try:
            yield
        finally:
            self._turn_on()

    @alone
    def _turn_off(self) -> None:
        self.adapter.require_present()
        if not self._disabled:
            self._merge_again = self.is_merged
            if self._merge_again:
                self.unmerge()
            self._swap_moved()
        self._disabled += 1  # counted, so that contexts may overlap, and nothing stale is put back
        for attached in self.adapter.tensors.attachments():
            attached.off.add(self.name)
        self._show_buffers()

    def _turn_on(self) -> None:
        with changing(self.model, refused=False):  # it was on before
            self._disabled -= 1
            if not self._disabled:
                spoil(self.model)
                for attached in self.adapter.tensors.attachments():
                    attached.off.discard(self.name)
                self._swap_moved()
                self._show_buffers()
                if self._merge_again and self.adapter.is_present:
                    self.merge()

    def merge(self, *, permanent: bool = False) -> None:
        """Fold the adapter into the weights; the forward then costs what the base's does.

        Merging twice is merging once. The base's parameters are kept aside for `unmerge`: one more
        copy of each adapted weight, until then. With `permanent` they are given up and the adapter
        leaves the model, which is a plain model again; see `merge`.

        Raises:
            StateError: a merged weight would not be finite (then nothing is merged), the adapter is
                disabled, or another adapter would compute something else; see `inject/folding.py`.
        """
        with changing(self.model):
            self.adapter.require_present()
            if permanent:
                merge(self.model, self.name)
            elif dense := _fold(self.model, [self.adapter]):
                _warn_of_dense(dense, 2, permanent=False)

    def unmerge(self) -> None:
        """Give the base its own parameters back, bit for bit."""
        with changing(self.model):
            self.adapter.require_present()
            with _ties_kept(self.model):
                for path in self.adapter.tensors.paths():
                    rest = tuple(
                        name
                        for name in attachments_at(self.model, path).merged
                        if name != self.name
                    )
                    set_merged(
                        module_at(self.model, path), path, rest, quantised.dtype_of(self.model)
                    )
                _keep_tables(self.model)

    @property
    def has_moved_base(self) -> bool:
        """Whether a copy of some base weight is in use that this adapter moves."""
        return any(
            attached.base_before_move and self.name in attached
            for attached in self.adapter.tensors.attachments()
        )

    def _swap_moved(self) -> None:
        for path in self.placement.methods:
            if is_adapted(module := module_at(self.model, path)):
                exchange_moved_weight(module)

    def _show_buffers(self) -> None:
        registry = registry_of(self.model)
        registry.buffers.show(self.model, registry.adapters)


def merge(model: nn.Module, names: str | Sequence[str]) -> None:
    """Fold these adapters into the weights for good, all at once; they leave the model.

    What the model computes with them in use does not change. `[]` does nothing. Other adapters may
    stay if their changes add to any weights.

    Raises:
        SettingError: an unknown name.
        StateError: a merged weight would not be finite, an adapter is disabled, another one is
            merged, or one that stays has a gain over a weight that would change. Then nothing is
            merged.
    """
    with changing(model):
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        known = registry_of(model).adapters
        if unknown := [name for name in names if name not in known]:
            there = ", ".join(map(repr, known)) or NO_ADAPTERS
            raise SettingError(f"no adapter {unknown[0]!r} in the model; there are: {there}")
        chosen = [known[name] for name in names]
        others = {name: adapter for name, adapter in known.items() if adapter not in chosen}
        if chosen and (
            merged := [name for name, adapter in others.items() if adapter.effect.is_merged]
        ):
            raise StateError(
                f"adapter {merged[0]!r} is merged too; unmerge it before merging {names[0]!r} "
                f"for good"
            )
        check_for_good(placements(chosen), placements(others.values()))
        if dense := _fold(model, chosen):
            _warn_of_dense(dense, 3, permanent=True)
        for path in (path for adapter in chosen for path in adapter.tensors.paths()):
            attached = attachments_at(model, path)
            (
                attached.base_before_merge,
                attached.base_before_move,
                attached.merged,
                attached.merged_weight,
            ) = {}, {}, (), None
        for adapter in chosen:
            registry_of(model).buffers.give_up(model, adapter)
            adapter.remove()
        quantised_ones = {path: module_at(model, path) for path in dense}
        quantised.replace(model, dense)
        for path, old in quantised_ones.items():
            if is_adapted(old):
                move_adapters(old, module_at(model, path))
        if (registry := registry_of(model)).adapters:
            registry.ties = Ties(model)
            watch_modules(model, registry)


def _fold(model: nn.Module, chosen: Sequence[InsertedAdapter]) -> dict[str, Tensor]:
    """Merge these adapters, all or none. Returns weights that stand beside quantised ones."""
    check_no_mixed_batch(model, "merged")
    if disabled := [adapter.name for adapter in chosen if adapter.effect.is_off]:
        raise StateError(
            f"adapter {disabled[0]!r} is disabled at the moment; merge it outside of disabled()"
        )
    others = [adapter for adapter in registry_of(model).adapters.values() if adapter not in chosen]
    check_base_in_place(
        {adapter.name: adapter for adapter in others if _share(adapter, chosen)}, "merging"
    )
    check_together(
        placements([*chosen, *(adapter for adapter in others if adapter.effect.is_merged)])
    )
    check_biases_apart(
        placements(
            [
                *chosen,
                *(
                    g
                    for g in others
                    if g.effect.is_merged or (g.effect.is_active and not g.effect.is_off)
                ),
            ]
        ),
        StateError,
    )
    dtype = quantised.dtype_of(model)
    before = {
        path: attachments_at(model, path).merged
        for adapter in chosen
        for path in adapter.tensors.paths()
    }
    with _ties_kept(model):
        try:
            for adapter in chosen:
                for path in adapter.tensors.paths():
                    if adapter.name not in (merged := attachments_at(model, path).merged):
                        set_merged(module_at(model, path), path, (*merged, adapter.name), dtype)
                tie_merged(model, adapter)
            _keep_tables(model)
        except BaseException:
            for path, merged in before.items():
                set_merged(module_at(model, path), path, merged, dtype)
            raise
    return {
        path: weight
        for path in before
        if (weight := attachments_at(model, path).merged_weight) is not None
    }


def _keep_tables(model: nn.Module) -> None:
    """Keep tied tables one, if the same adapters with trained rows are merged into them."""
    for adapter in registry_of(model).adapters.values():
        paths = places_of(adapter.placement.tokens)
        keep_ties(
            model,
            adapter.placement.tokens,
            {path: attachments_at(model, path).merged for path in paths},
        )


@contextlib.contextmanager
def _ties_kept(model: nn.Module) -> Iterator[None]:
    """Change merged weights inside. Ties are restored before, and parted after if need be."""
    ties = registry_of(model).ties
    if ties is None:
        yield
        return
    ties.rejoin()
    try:
        yield
    finally:
        ties.part(model)


def placements(chosen: Iterable[InsertedAdapter]) -> dict[str, Placement]:
    return {adapter.name: adapter.placement for adapter in chosen}


def _share(adapter: InsertedAdapter, others: Sequence[InsertedAdapter]) -> bool:
    """Whether an adapter is on a module that one of the others is on too."""
    return any(set(adapter.tensors.paths()) & set(other.tensors.paths()) for other in others)


def check_no_mixed_batch(model: nn.Module, what: str) -> None:
    if any(attached.mixed_batch is not None for attached in attachments_in(model)):
        raise StateError(
            f"inside mixed_batch the adapters are what they were when it began; none can be {what}"
        )


def check_base_in_place(known: Mapping[str, InsertedAdapter], purpose: str) -> None:
    if moved := [name for name, adapter in known.items() if adapter.effect.has_moved_base]:
        raise StateError(
            f"adapter {moved[0]!r} has moved the base weights in place, so others cannot be used "
            "beside it; save and load it (files hold the form that leaves the base alone), or "
            f"remove it before {purpose}"
        )


def _warn_of_dense(dense: Mapping[str, Tensor], stacklevel: int, permanent: bool) -> None:
    size = sum(weight.numel() * weight.element_size() for weight in dense.values())
    beside = (
        ""
        if permanent
        else ", which save_pretrained does not write before they are merged for good"
    )
    warnings.warn(
        f"the base is quantised: merged, its {len(dense)} adapted layers are "
        f"{next(iter(dense.values())).dtype} and take {size / 2**20:,.1f} MiB{beside}. To keep "
        "what was learned in a full-precision model, merge into the base that was quantised, with "
        "lorakin merge --model",
        LorakinWarning,
        stacklevel=stacklevel + 1,
    )
