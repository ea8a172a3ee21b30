"""Layers by number: which modules lie in the layers that a user names, such as 0-3,-1."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorakin.errors import SettingError, TargetError

MOST_LAYERS = 10_000
"""How many layers one range may name."""
PARTS = 1_000
"""How many ranges a text may have."""
IN_A_LIST = re.compile(r"(?:^|\.)[^.]*[^.\d][^.]*\.(\d+)(?:\.|$)")
"""The number of a layer behind a name, as in `layers.3`."""
IN_A_SEQUENCE = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
"""A bare number, as in the paths of an nn.Sequential."""


def parse_layers(text: str) -> list[int]:
    """Returns the layer indices that a text names.

    Raises:
        SettingError: the text has another form, or a range is longer than any model.

    >>> parse_layers("0-3,8,-1")
    [0, 1, 2, 3, 8, -1]
    """
    indices: dict[int, None] = {}
    parts = text.split(",", PARTS)
    if len(parts) > PARTS:
        raise SettingError(f"layers has more than {PARTS:,} ranges, which no model needs")
    for part in parts:
        if not (match := re.fullmatch(r"\s*(-?[0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?\s*", part)):
            raise SettingError(f"layers must look like 0-3,8,-1, not {text[:80]!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= first + MOST_LAYERS:
            raise SettingError(
                f"layers {part.strip()!r} are more than {MOST_LAYERS:,}, which no model has"
            )
        indices |= dict.fromkeys(range(first, last + 1))
    return list(indices)


def in_layers(paths: Sequence[str], indices: int | Sequence[int]) -> list[str]:
    """Returns the paths inside the layers with these numbers; negative ones count from the end.

    A model may have several lists of layers, as an encoder and a decoder do. The numbers count in
    each of them, so −1 selects the last of each.

    Raises:
        TargetError: no list has a layer of that number.

    >>> in_layers(["layers.0.q", "layers.1.q", "layers.2.q"], [-1])
    ['layers.2.q']
    """
    matches = {p: m for p in paths if (m := IN_A_LIST.search(p) or IN_A_SEQUENCE.search(p))}
    layer_of = {path: (path[: match.start(1)], int(match[1])) for path, match in matches.items()}
    counts: dict[str, int] = {}
    for stack, number in layer_of.values():
        counts[stack] = max(counts.get(stack, 0), number + 1)

    selected: set[tuple[str, int]] = set()
    for index in [indices] if isinstance(indices, int) else indices:
        layers = {(s, index % count) for s, count in counts.items() if -count <= index < count}
        if not layers:
            present = ", ".join(f"{stack}0 to {stack}{n - 1}" for stack, n in counts.items())
            raise TargetError(
                f"layers: there is no layer {index}; the selected modules lie in "
                f"{present or 'no numbered layers'}"
            )
        selected |= layers
    return [path for path in paths if layer_of.get(path) in selected]
