"""mlx-lm: `<path>.lora_a` (in, r), `.lora_b` (r, out), `.m` (out).

An embedding has `.lora_a` (vocabulary, r) and `.lora_b` (r, dim), and is adapted as the head too if
the two are tied. The scale is `lora_parameters.scale` in `adapter_config.json`. mlx-lm up to 0.14
multiplied by scale·alpha/r. From 0.15 on it wrote the same alpha and ignored it, and only from 0.19
on does `num_layers` tell the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakin.family import members
from lorakin.inject import layer_kinds
from lorakin.inject.layer_kinds import EmbeddingLayer
from lorakin.storage.foreign.foreign_file import Foreign, ForeignFile

KEY = r".*\.(lora_[ab]|m)"


def read(source: ForeignFile) -> Foreign:
    """The adapter in a file of mlx-lm's."""
    settings: Mapping[str, Any] = {}
    if "lora_parameters" in source.config:
        settings = source.said(dict[str, Any], source.config, "lora_parameters")
    with_gain = [member.word for member in members() if "gain" in member.decides]
    kind = source.config.get("fine_tune_type")
    gains = kind in with_gain or source.config.get("use_dora") is True
    found = Foreign("mlx-lm", {}, {}, [])
    for path, slots in source.split({"lora_a": "A", "lora_b": "B", "m": "m"}).items():
        if slots["A"].ndim != 2 or slots["B"].ndim != 2:
            raise source.error(
                f"{path} is a layer of experts, {tuple(slots['A'].shape)}, which this version does "
                "not read"
            )
        if gains and "m" not in slots:
            raise source.error(f"{path} lacks m, but its config says that magnitudes were trained")
        module, _ = source.module(path)
        is_embedding = layer_kinds.kind_of(module) is EmbeddingLayer
        if is_embedding and "m" in slots:
            raise source.error(
                f"{path} is an embedding with a magnitude for each word, not for each output, "
                "which is another method"
            )
        rank = slots["A"].shape[1]
        turned = {**slots, "A": slots["A"].T, "B": slots["B"].T}
        found.slots[path] = source.checked(path, turned)
        found.scales[path] = source.scale(path, rank, _scales(source, settings, rank))
        for head in source.tied(path) if is_embedding else []:
            found.slots[head] = source.checked(head, {"A": slots["B"], "B": slots["A"]})
            found.scales[head] = found.scales[path]
            found.notes.append(f"{path}: {head} is tied to it and changes with it, as in mlx-lm")
    return found


def _scales(source: ForeignFile, settings: Mapping[str, Any], rank: int) -> set[float]:
    """What the config can mean: no scale, one, or two from when alpha was written and ignored."""
    if "scale" not in settings:
        return set()
    scale = source.number(settings, "scale")
    if "alpha" in settings and "num_layers" not in source.config:
        return {scale, scale * (source.number(settings, "alpha") / rank)}
    return {scale}
