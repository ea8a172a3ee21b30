"""Adapters from older transformers versions, whose modules were renamed or merged since.

To load older checkpoints, transformers has conversions from the old weights to those of today's
models. What it does with a module's weight is done here with the module's pair:

    renamed                              the pair moves
    several concatenated                 blocks: A = [A₁; A₂; …], B = diag(B₁, B₂, …), ranks added
    one cut into several                 A goes to each, with its rows of B
    one for each expert, put in a stack  the pair of that expert

Blocks keep each pair's scale: where scales differ, B is multiplied by the quotient. A magnitude is
treated like B's rows. Only modules that the model does not have are looked up, and transformers is
not imported for it.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError
from lorakin.inject import layer_kinds
from lorakin.storage.peft.formats import DOWN, MAGNITUDE, UP
from lorakin.storage.peft.scales import PairScale, scale_at

Slots = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class RenamedPlace:
    """Where a module of the file is today: all of `path`, or part `number` of its `parts`."""

    path: str
    number: int = 0
    parts: int = 1
    cut: tuple[int, int] | None = None
    """If the old weight was cut: which piece this is, of how many."""


class OldModule(NamedTuple):
    """A module of the file, and where it is today."""

    place: RenamedPlace
    old_path: str


@dataclasses.dataclass(frozen=True)
class RenamedFiles:
    """An adapter's files with the model's names."""

    config: Mapping[str, Any]
    slots: dict[str, dict[str, Tensor]]
    rest: dict[str, Tensor]
    old_paths: dict[str, list[str]]
    """Path → its paths in the file, where these are others."""


def renamed_files(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    slots: dict[str, dict[str, Tensor]],
    rest: dict[str, Tensor],
    where: str,
) -> RenamedFiles:
    """Returns the file's modules and other tensors under the names that they have in `model`.

    What has no other name there is not changed.

    Raises:
        AdapterError: parts of one weight that do not fit together.
    """
    unknown = [path for path in slots if not _can_adapt(modules, path)]
    lost = [
        key for key in rest if key.rpartition(".")[0].removesuffix(".base_layer") not in modules
    ]
    conversion = _CheckpointConversion.of(model) if unknown or lost else None
    if conversion is None:
        return RenamedFiles(config, slots, rest, {})

    sources: dict[str, list[OldModule]] = {}
    for old in unknown:
        for place in conversion.places(old, modules):
            sources.setdefault(place.path, []).append(OldModule(place, old))
    moved = {source.old_path for of_path in sources.values() for source in of_path}
    renamed = {path: of_path for path, of_path in slots.items() if path not in moved}
    if clash := [path for path in sources if path in renamed]:
        old_path = sources[clash[0]][0].old_path
        raise AdapterError(f"{where}: it adapts {clash[0]} twice, as that and as {old_path}")

    scales: dict[str, PairScale] = {}
    for path, of_path in sources.items():
        of_path = sorted(of_path, key=lambda source: source.place.number)
        old_scales = [scale_at(config, source.old_path) for source in of_path]
        renamed[path], scales[path] = _converted(modules[path], of_path, slots, old_scales, where)
    whole_modules = config.get("modules_to_save")
    if whole_modules and lost:
        todays = [conversion.todays_path(name) for name in whole_modules]
        config = {**config, "modules_to_save": [*whole_modules, *todays]}
    others = {
        conversion.todays_key(key, modules) if key in lost else key: tensor
        for key, tensor in rest.items()
    }
    old_paths = {path: [source.old_path for source in of] for path, of in sources.items()}
    return RenamedFiles(_with_scales(config, scales, renamed), renamed, others, old_paths)


def _can_adapt(modules: Mapping[str, nn.Module], path: str) -> bool:
    return path in modules and (
        layer_kinds.kind_of(modules[path]) is not None or f"{path}.weight.0" not in modules
    )


class _CheckpointConversion:
    """transformers' own conversion of checkpoints, asked about single names."""

    def __init__(
        self, renamings: list[Any], converters: list[Any], rename: Callable[..., Any]
    ) -> None:
        self.renamings, self.converters, self.rename = renamings, converters, rename

    @classmethod
    def of(cls, model: nn.Module) -> _CheckpointConversion | None:
        """Returns the conversion of the model's class; None if transformers has none for it."""
        has_type = hasattr(getattr(model, "config", None), "model_type")
        if "transformers" not in sys.modules or not has_type:
            return None
        try:
            mapping = importlib.import_module("transformers.conversion_mapping")
            loading = importlib.import_module("transformers.core_model_loading")
            conversions_of = mapping.get_model_conversion_mapping
        except (ImportError, AttributeError):  # a version without conversions
            return None
        if not isinstance(model, importlib.import_module("transformers").PreTrainedModel):
            return None
        steps = conversions_of(model)
        converters = [step for step in steps if isinstance(step, loading.WeightConverter)]
        renamings = [step for step in steps if step not in converters]
        return cls(renamings, converters, loading.rename_source_key)

    def todays_key(self, key: str, modules: Mapping[str, nn.Module]) -> str:
        """Returns a parameter's key today, if it has another one."""
        new_key, source = self.rename(key, self.renamings, self.converters)
        return new_key if source is None and new_key.rpartition(".")[0] in modules else key

    def todays_path(self, path: str) -> str:
        """Returns a module's path today."""
        new_key: str = self.rename(f"{path}.weight", self.renamings, [])[0]
        return new_key.removesuffix(".weight")

    def places(self, path: str, modules: Mapping[str, nn.Module]) -> list[RenamedPlace]:
        """Returns where the module at `path` is today; [] if that is not known."""
        new_key, source = self.rename(f"{path}.weight", self.renamings, self.converters)
        new_path = new_key.removesuffix(".weight")
        if source is None:
            # A module, or a parameter that acts as one.
            possible = (new_path, f"{new_key}.0")
            return [RenamedPlace(p) for p in possible if _can_adapt(modules, p)][:1]
        converter = next(c for c in self.converters if source in c.source_patterns)
        sources, targets = converter.source_patterns, converter.target_patterns
        kinds = [type(operation).__name__ for operation in converter.operations]
        if len(targets) > 1:
            if len(sources) > 1 or kinds != ["Chunk"] or converter.operations[0].dim != 0:
                return []
            paths = [
                new_key.replace(targets[0], target, 1).removesuffix(".weight") for target in targets
            ]
            places = [RenamedPlace(p, cut=(n, len(paths))) for n, p in enumerate(paths)]
            return places if all(place.path in modules for place in places) else []
        if not _only_joins(converter.operations):
            return []
        if "MergeModulelist" in kinds:
            before = self.rename(f"{path}.weight", self.renamings, [])[0]
            number = re.search(source.replace("*.", r"(\d+)\."), before)
            new_path = f"{new_path}.{number[1]}" if number else new_path
        if new_path not in modules:
            return []
        return [RenamedPlace(new_path, sources.index(source), len(sources))]


def _only_joins(operations: Iterable[Any]) -> bool:
    """Returns whether these only stack weights, concatenate their outputs or transpose them."""
    axes = ["outputs", "inputs"]
    for operation in operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist" and operation.dim == 0:
            axes.insert(0, "experts")
        elif kind == "Transpose":
            first, second = operation.dim0, operation.dim1
            axes[first], axes[second] = axes[second], axes[first]
        elif kind != "Concatenate" or axes[operation.dim] != "outputs":
            return False
    return True


def _converted(
    module: nn.Module,
    sources: Sequence[OldModule],
    slots: Mapping[str, Slots],
    scales: Sequence[PairScale],
    where: str,
) -> tuple[dict[str, Tensor], PairScale]:
    """Returns the slots and the scale of today's module.

    Args:
        module: today's module.
        sources: the file's modules that are today in `module`, in the order of its outputs.
        slots: path → slots of the file's modules.
        scales: the scale of each source.
        where: the file, for messages.
    """
    place = sources[0].place
    of_sources = [dict(slots[source.old_path]) for source in sources]
    if place.cut is not None:
        index, pieces = place.cut
        cut = {
            slot: tensor if slot == DOWN else tensor.chunk(pieces)[index]
            for slot, tensor in of_sources[0].items()
        }
        return cut, scales[0]
    if place.parts == 1:
        return of_sources[0], scales[0]
    kind = layer_kinds.kind_of(module)
    assert kind is not None
    outputs, inputs = kind.shape(module)[:2]
    _check_pairs(sources, of_sources, scales, inputs, where)
    starts = _starts(sources, [len(of_source[UP]) for of_source in of_sources], outputs)
    with_magnitude = sum(MAGNITUDE in of_source for of_source in of_sources)
    if starts is None or with_magnitude not in (0, place.parts):
        raise AdapterError(
            f"{where}: {', '.join(source.old_path for source in sources)} are {place.parts} parts "
            f"of {place.path} ({outputs} rows) in this model, and what the file has of them does "
            "not fill it"
        )
    return _blocks(of_sources, scales, starts, outputs)


def _check_pairs(
    sources: Sequence[OldModule],
    of_sources: Sequence[Slots],
    scales: Sequence[PairScale],
    inputs: int,
    where: str,
) -> None:
    """Checks that the parts of one weight are pairs of their ranks; raises `AdapterError`."""
    for source, slots, scale in zip(sources, of_sources, scales, strict=True):
        is_pair = {DOWN, UP} <= slots.keys() <= {DOWN, UP, MAGNITUDE}
        is_pair = is_pair and slots[DOWN].dim() == slots[UP].dim() == 2
        is_pair = is_pair and slots[DOWN].shape == (scale.rank, inputs)
        if not is_pair or slots[UP].shape[1] != scale.rank:
            shapes = ", ".join(f"{slot} {tuple(tensor.shape)}" for slot, tensor in slots.items())
            raise AdapterError(
                f"{where}: {source.old_path} has {shapes}; expected a pair of rank {scale.rank} to "
                f"put into {source.place.path}"
            )


def _blocks(
    of_sources: Sequence[Slots],
    scales: Sequence[PairScale],
    starts: Sequence[int],
    outputs: int,
) -> tuple[dict[str, Tensor], PairScale]:
    """Returns pairs of parts of the outputs, whose first rows are `starts`, as one pair."""
    total = PairScale(sum(scale.rank for scale in scales), 1.0, scales[0].rslora)
    total = total._replace(alpha=scales[0].value / total.value)
    up = of_sources[0][UP].new_zeros(outputs, total.rank)
    column = 0
    for start, slots, scale in zip(starts, of_sources, scales, strict=True):
        B, factor = slots[UP], 1.0 if scale == scales[0] else scale.value / scales[0].value
        up[start : start + len(B), column : column + B.shape[1]] = B if factor == 1 else factor * B
        column += B.shape[1]
    joined = {DOWN: torch.cat([slots[DOWN] for slots in of_sources]), UP: up}
    magnitudes = [slots[MAGNITUDE] for slots in of_sources if MAGNITUDE in slots]
    return (joined | {MAGNITUDE: torch.cat(magnitudes)} if magnitudes else joined), total


def _starts(sources: Sequence[OldModule], rows: Sequence[int], outputs: int) -> list[int] | None:
    """Returns each source's first row; None if a size is unknown or they do not fit.

    `rows`: the number of rows of each source.
    """
    parts = sources[0].place.parts
    if len(sources) == parts:
        return [sum(rows[:n]) for n in range(parts)] if sum(rows) == outputs else None
    # Some parts are not in the file, so all must be of one size.
    if set(rows) != {outputs / parts}:
        return None
    return [source.place.number * rows[0] for source in sources]


def _with_scales(
    config: Mapping[str, Any], scales: Mapping[str, PairScale], paths: Iterable[str]
) -> Mapping[str, Any]:
    """Returns the config with these ranks and alphas, in as few patterns as possible."""
    scales_by_end: dict[str, set[PairScale]] = {}
    for path, scale in scales.items():
        scales_by_end.setdefault(_end(path), set()).add(scale)
    # Names of which not all modules have the same scale; these need a pattern for each path.
    mixed = {_end(path) for path in paths if path not in scales}
    mixed |= {end for end, of_end in scales_by_end.items() if len(of_end) > 1}
    for field, name in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        patterns = {}
        for path, scale in scales.items():
            value, end = getattr(scale, name), _end(path)
            if getattr(scale_at(config, path), name) == value:
                continue
            by_end = rf"(?:{re.escape(end)})(?:\.\d+)?"
            key = f"^{re.escape(path)}" if end in mixed else by_end
            patterns[key] = int(value) if float(value).is_integer() else value
        if patterns:
            config = {**config, field: patterns | dict(config.get(field) or {})}
    return config


def _end(path: str) -> str:
    """Returns the last name of a path without an expert's index."""
    return re.sub(r"\.\d+$", "", path).rpartition(".")[2]
