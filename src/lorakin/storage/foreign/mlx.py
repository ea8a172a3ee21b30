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
from lorakin.storage.foreign.foreign_file import ForeignAdapter, ForeignFile
from lorakin.storage.peft.formats import DOWN, MAGNITUDE, UP

KEY = r".*\.(lora_[ab]|m)"


def read(source: ForeignFile) -> ForeignAdapter:
    """Returns the adapter in a file of mlx-lm's."""
    settings: Mapping[str, Any] = {}
    if "lora_parameters" in source.config:
        settings = source.field(dict[str, Any], source.config, "lora_parameters")
    with_gain = [member.word for member in members() if "gain" in member.decides]
    kind = source.config.get("fine_tune_type")
    gains = kind in with_gain or source.config.get("use_dora") is True
    adapter = ForeignAdapter("mlx-lm", {}, {}, [])
    for path, slots in source.split({"lora_a": DOWN, "lora_b": UP, MAGNITUDE: MAGNITUDE}).items():
        if slots[DOWN].ndim != 2 or slots[UP].ndim != 2:
            raise source.error(
                f"{path} is a layer of experts, {tuple(slots[DOWN].shape)}, which this version "
                "does not read"
            )
        if gains and MAGNITUDE not in slots:
            raise source.error(f"{path} lacks m, but its config says that magnitudes were trained")
        module, _ = source.module(path)
        is_embedding = layer_kinds.kind_of(module) is EmbeddingLayer
        if is_embedding and MAGNITUDE in slots:
            raise source.error(
                f"{path} is an embedding with a magnitude for each word, not for each output, "
                "which is another method"
            )
        rank = slots[DOWN].shape[1]
        transposed = {**slots, DOWN: slots[DOWN].T, UP: slots[UP].T}
        adapter.slots[path] = source.checked(path, transposed)
        adapter.scales[path] = source.scale(path, rank, _scales(source, settings, rank))
        for head in source.tied(path) if is_embedding else []:
            adapter.slots[head] = source.checked(head, {DOWN: slots[UP], UP: slots[DOWN]})
            adapter.scales[head] = adapter.scales[path]
            adapter.notes.append(f"{path}: {head} is tied to it and changes with it, as in mlx-lm")
    return adapter


def _scales(source: ForeignFile, settings: Mapping[str, Any], rank: int) -> set[float]:
    """Returns the scales that the config can mean: two if mlx-lm may have ignored its alpha."""
    if "scale" not in settings:
        return set()
    scale = source.number(settings, "scale")
    if "alpha" in settings and "num_layers" not in source.config:
        return {scale, scale * (source.number(settings, "alpha") / rank)}
    return {scale}
