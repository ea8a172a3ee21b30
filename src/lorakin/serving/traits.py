"""What an adapter holds, as far as it decides which program can serve it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorakin.conversion import RANK_MULTIPLE
from lorakin.inject import layer_kinds
from lorakin.serving.gguf_format import ARCHITECTURES
from lorakin.storage import directory
from lorakin.storage.summary import summarise
from lorakin.training.base_class import kind_for
from lorakin.training.chat_templates import remembered_template
from lorakin.training.model_sources import located
from lorakin.training.models import config_of
from lorakin.training.with_adapter import recipe_labels


@dataclasses.dataclass(frozen=True)
class Traits:
    """What an adapter holds, and what its base is.

    Attributes:
        rank: the rank of the adapter as portable plain LoRA.
        has_gain: whether it scales the base's outputs, as DoRA does.
        whole_modules: the modules that are trained whole.
        tokens: the tables with trained token rows.
        has_biases: whether biases are trained.
        other_layers: adapted modules that are not linear layers.
        generates: whether the model generates text.
        is_encoder_decoder: whether the model has an encoder and a decoder.
        has_gguf_base: whether the base is, or can be written as, a GGUF model.
        template: the chat template that it was trained with, if that is not the base's own.

    >>> Traits(rank=8).generates
    True
    """

    rank: int
    has_gain: bool = False
    whole_modules: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    has_biases: bool = False
    other_layers: tuple[str, ...] = ()
    generates: bool = True
    is_encoder_decoder: bool = False
    has_gguf_base: bool = True
    template: str | None = None


def traits_of(folder: Path, base: str) -> Traits:
    """Returns what the adapter in `folder` holds, without loading the base's weights.

    Raises:
        AdapterError, ModelError: the adapter or the base's config cannot be read.
    """
    summary, files = summarise(folder), directory.read(folder)
    config = config_of(base)
    model = kind_for(files, config, recipe_labels(files)).skeleton(config)
    modules = dict(model.named_modules())
    linear = (layer_kinds.LinearLayer, layer_kinds.TransposedLayer)
    kinds = {
        path: layer_kinds.kind_of(modules[path]) if path in modules else None
        for path in summary.pairs
    }
    largest = max((pair.down.shape[0] for pair in summary.pairs.values()), default=1)
    architecture = ARCHITECTURES.get(config.model_type)
    return Traits(
        rank=-(-max(largest, 1) // RANK_MULTIPLE) * RANK_MULTIPLE,
        has_gain=summary.has_gain,
        whole_modules=summary.whole_modules,
        tokens=tuple(summary.tokens),
        has_biases=summary.bias != "none",
        other_layers=tuple(path for path, kind in kinds.items() if kind not in linear),
        generates=bool(model.can_generate()),
        is_encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
        has_gguf_base=Path(located(base)).suffix == ".gguf"
        or (architecture is not None and architecture.whole),
        template=remembered_template(folder),
    )
