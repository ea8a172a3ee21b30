"""The keys and values of a conversation, kept so that the next turn computes only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicLayer


class KeptCache:
    """transformers' cache of the last answer, and the tokens that it was computed of.

    Only caches that hold every token's keys and values are kept: those of sliding windows and of
    state-space models cannot be cut where two conversations part.
    """

    def __init__(self) -> None:
        self.owner: Any = None
        self.ids: list[int] = []
        self.cache: Any = None

    def take(self, owner: Any, ids: Sequence[int]) -> Any:
        """Returns the cache up to where these tokens differ from its own; None if none fits.

        It is handed over: after an error the next turn begins without one.

        Args:
            owner: who computes; a cache is of use only to who made it.
            ids: the tokens of a prompt.
        """
        cache, self.cache = self.cache, None
        if cache is None or self.owner is not owner:
            return None
        pairs = enumerate(zip(self.ids, ids, strict=False))
        same = next((n for n, (a, b) in pairs if a != b), min(len(self.ids), len(ids)))
        length = cache.get_seq_length()
        kept = min(same, length, len(ids) - 1)  # one token must be computed
        if kept < 1:
            return None
        if kept < length:
            cache.crop(kept - length)
        return cache

    def keep(self, owner: Any, ids: Sequence[int], cache: Any) -> None:
        """Keeps a cache, if it can be cut.

        Args:
            owner: who made it.
            ids: the tokens that it was computed of, perhaps with one more.
            cache: transformers' cache.
        """
        layers = getattr(cache, "layers", [])
        can_be_cut = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
        self.owner, self.ids, self.cache = owner, list(ids), cache if can_be_cut else None
