"""Whether, how strongly and in which form an adapter acts: active, disabled, scaled, merged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorakin.inject import quantised
from lorakin.inject.adapted import (
    attachments_at,
    exchange_moved_weight,
    is_adapted,
    module_at,
)
from lorakin.inject.folding import set_merged
from lorakin.inject.merging import (
    merge_adapters,
    merge_for_good,
    share_merged_tables,
    ties_restored,
    warn_of_plain_weights,
)
from lorakin.inject.model_registry import check_no_mixed_batch, registry_of
from lorakin.inject.part import Part
from lorakin.inject.scale import rescale
from lorakin.inject.threads import changing, fail_other_forwards, one_at_a_time

if TYPE_CHECKING:
    from lorakin.inject.inserted import InsertedAdapter


class Effect(Part):
    """Whether, how strongly and in which form an adapter acts in its model."""

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
        """Whether the adapter was chosen by `activate`."""
        return any(
            self.name in attachments_at(self.model, path).active
            for path in self.adapter.tensors.paths()
        )

    @property
    def is_off(self) -> bool:
        """Whether a `disabled()` block is open."""
        return self._disabled > 0

    @property
    def scale(self) -> float:
        """The factor on the adapter's change; see `Adapter.scale`."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        with changing(self.model):
            self._rescale(scale)

    def _rescale(self, scale: float) -> None:
        self.adapter.check_present()
        check_no_mixed_batch(self.model, "scaled")
        with ties_restored(self.model) if self.is_merged else contextlib.nullcontext():
            self._scale = rescale(self.adapter, scale)

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Uses another scale inside a `with` block; see `Adapter.scaled`."""
        before, self.scale = self._scale, scale
        try:
            yield
        finally:
            with changing(self.model, refused=False):
                if self.adapter.is_present:
                    fail_other_forwards(self.model)
                    self._rescale(before)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Switches the adapter off inside a `with` block; see `Adapter.disabled`."""
        self._turn_off()
        try:
            yield
        finally:
            self._turn_on()

    @one_at_a_time
    def _turn_off(self) -> None:
        self.adapter.check_present()
        if not self._disabled:
            self._merge_again = self.is_merged
            if self._merge_again:
                self.unmerge()
            self._exchange_moved_weights()
        # Counted, so that blocks may overlap without restoring an old state.
        self._disabled += 1
        for attached in self.adapter.tensors.attachments():
            attached.off.add(self.name)
        self._use_buffers()

    def _turn_on(self) -> None:
        # Never refused: the adapter was on before.
        with changing(self.model, refused=False):
            self._disabled -= 1
            if not self._disabled:
                fail_other_forwards(self.model)
                for attached in self.adapter.tensors.attachments():
                    attached.off.discard(self.name)
                self._exchange_moved_weights()
                self._use_buffers()
                if self._merge_again and self.adapter.is_present:
                    self.merge()

    def merge(self, *, permanent: bool = False) -> None:
        """Folds the adapter into the weights; see `Adapter.merge`."""
        with changing(self.model):
            self.adapter.check_present()
            if permanent:
                merge_for_good(self.model, self.name)
            elif plain_weights := merge_adapters(self.model, [self.adapter]):
                warn_of_plain_weights(plain_weights, stacklevel=2, permanent=False)

    def unmerge(self) -> None:
        """Gives the base its parameters back; see `Adapter.unmerge`."""
        with changing(self.model):
            self.adapter.check_present()
            with ties_restored(self.model):
                dtype = quantised.dtype_of(self.model)
                for path in self.adapter.tensors.paths():
                    merged = attachments_at(self.model, path).merged
                    others = tuple(name for name in merged if name != self.name)
                    set_merged(module_at(self.model, path), path, others, dtype)
                share_merged_tables(self.model)

    @property
    def has_moved_base(self) -> bool:
        """Whether this adapter has moved a copy of some base weight, and the copy is in use."""
        return any(
            attached.base_before_move and self.name in attached
            for attached in self.adapter.tensors.attachments()
        )

    def _exchange_moved_weights(self) -> None:
        for path in self.placement.methods:
            if is_adapted(module := module_at(self.model, path)):
                exchange_moved_weight(module)

    def _use_buffers(self) -> None:
        registry = registry_of(self.model)
        registry.buffers.use(self.model, registry.adapters)
