"""Adapters from older transformers versions, whose modules were renamed or merged since.

To load older checkpoints, transformers knows how their weights became those of today's models. What
it does with a module's weight is done here with the module's pair:

    renamed                              the pair moves
    several put one below another        blocks: A = [A₁; A₂; …], B = diag(B₁, B₂, …), ranks added
    up one cut into several                 A goes to each, with its own rows of B
    one for each expert, put in a stack  the pair of that expert

Blocks keep each pair's own scale: where scales differ, B is multiplied by what is missing. A
magnitude goes with B's rows.
Only modules that the model does not have are looked up, and transformers is not imported for it.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError
from lorakin.inject import layer_kinds
from lorakin.storage.peft.scales import PairScale, scale_at

Slots = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class RenamedPlace:
    """Where a module of the file is today: all of `path`, or part `number` of the `parts` there."""

    path: str
    number: int = 0
    parts: int = 1
    cut: tuple[int, int] | None = None
    """Of a weight that was cut: which of how many pieces this is."""


@dataclasses.dataclass(frozen=True)
class Todays:
    """An adapter's files in the model's names. `former`: path → the paths in the file."""

    config: Mapping[str, Any]
    slots: dict[str, dict[str, Tensor]]
    rest: dict[str, Tensor]
    former: dict[str, list[str]]


def todays(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
    slots: dict[str, dict[str, Tensor]],
    rest: dict[str, Tensor],
    where: str,
) -> Todays:
    """The file's modules and other tensors under the names that they have in `model`.

    What has no other name there stays as it is.

    Raises:
        AdapterError: parts of one weight that do not fit together.
    """
    unknown = [path for path in slots if not _can_adapt(modules, path)]
    lost = [
        key for key in rest if key.rpartition(".")[0].removesuffix(".base_layer") not in modules
    ]
    names = _Names.of(model) if unknown or lost else None
    if names is None:
        return Todays(config, slots, rest, {})
    parts: dict[str, list[tuple[RenamedPlace, str]]] = {}
    for old in unknown:
        for place in names.places(old, modules):
            parts.setdefault(place.path, []).append((place, old))
    moved = {old for there in parts.values() for _, old in there}
    done = {path: own for path, own in slots.items() if path not in moved}
    if clash := [path for path in parts if path in done]:
        raise AdapterError(
            f"{where}: it adapts {clash[0]} twice, as that and as {parts[clash[0]][0][1]}"
        )
    scales: dict[str, PairScale] = {}
    for path, there in parts.items():
        done[path], scales[path] = _joined(modules[path], path, there, slots, config, where)
    whole = config.get("modules_to_save")
    if whole and lost:
        config = {**config, "modules_to_save": [*whole, *(names.whole(name) for name in whole)]}
    left = {names.key(key, modules) if key in lost else key: tensor for key, tensor in rest.items()}
    former = {path: [old for _, old in there] for path, there in parts.items()}
    return Todays(_with_scales(config, scales, done), done, left, former)


def _can_adapt(modules: Mapping[str, nn.Module], path: str) -> bool:
    return path in modules and (
        layer_kinds.kind_of(modules[path]) is not None or f"{path}.weight.0" not in modules
    )


class _Names:
    """transformers' own conversion of checkpoints, asked about single names."""

    def __init__(
        self, renamings: list[Any], converters: list[Any], rename: Callable[..., Any]
    ) -> None:
        self.renamings, self.converters, self.rename = renamings, converters, rename

    @classmethod
    def of(cls, model: nn.Module) -> _Names | None:
        """Those for the model's class; None if it is not transformers', or has no conversions."""
        if "transformers" not in sys.modules or not hasattr(
            getattr(model, "config", None), "model_type"
        ):
            return None
        try:
            mapping = importlib.import_module(
                "transformers.conversion_mapping"
            ).get_model_conversion_mapping
            loading = importlib.import_module("transformers.core_model_loading")
        except (ImportError, AttributeError):  # of a version without conversions
            return None
        if not isinstance(model, importlib.import_module("transformers").PreTrainedModel):
            return None
        known = mapping(model)
        converters = [one for one in known if isinstance(one, loading.WeightConverter)]
        return cls(
            [one for one in known if one not in converters], converters, loading.rename_source_key
        )

    def key(self, key: str, modules: Mapping[str, nn.Module]) -> str:
        """A parameter's name today, if it has another one."""
        new, source = self.rename(key, self.renamings, self.converters)
        return new if source is None and new.rpartition(".")[0] in modules else key

    def whole(self, path: str) -> str:
        """A module's path today."""
        new: str = self.rename(f"{path}.weight", self.renamings, [])[0]
        return new.removesuffix(".weight")

    def places(self, path: str, modules: Mapping[str, nn.Module]) -> list[RenamedPlace]:
        """Where the module at `path` is today; nothing if that is not known."""
        new, source = self.rename(f"{path}.weight", self.renamings, self.converters)
        if source is None:
            found = [RenamedPlace(new.removesuffix(".weight")), RenamedPlace(f"{new}.0")]
            return [
                place
                for place in found
                if place.path in modules and _can_adapt(modules, place.path)
            ][:1]
        converter = next(one for one in self.converters if source in one.source_patterns)
        sources, targets = converter.source_patterns, converter.target_patterns
        kinds = [type(operation).__name__ for operation in converter.operations]
        if len(targets) > 1:
            if len(sources) > 1 or kinds != ["Chunk"] or converter.operations[0].dim != 0:
                return []
            paths = [
                new.replace(targets[0], target, 1).removesuffix(".weight") for target in targets
            ]
            places = [RenamedPlace(one, cut=(n, len(paths))) for n, one in enumerate(paths)]
            return places if all(place.path in modules for place in places) else []
        if not _only_puts_together(converter.operations):
            return []
        new = new.removesuffix(".weight")
        if "MergeModulelist" in kinds:
            before = self.rename(f"{path}.weight", self.renamings, [])[0]
            number = re.search(source.replace("*.", r"(\d+)\."), before)
            new = f"{new}.{number[1]}" if number else new
        return [RenamedPlace(new, sources.index(source), len(sources))] if new in modules else []


def _only_puts_together(operations: Iterable[Any]) -> bool:
    """Whether these only stack weights (outputs, inputs), join their outputs or transpose them."""
    axes = ["outputs", "inputs"]
    for operation in operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist" and operation.dim == 0:
            axes.insert(0, "experts")
        elif kind == "Transpose":
            one, other = operation.dim0, operation.dim1
            axes[one], axes[other] = axes[other], axes[one]
        elif kind != "Concatenate" or axes[operation.dim] != "outputs":
            return False
    return True


def _joined(
    module: nn.Module,
    path: str,
    there: list[tuple[RenamedPlace, str]],
    slots: Mapping[str, Slots],
    config: Mapping[str, Any],
    where: str,
) -> tuple[dict[str, Tensor], PairScale]:
    """The slots and the scale of today's module, of the file's modules that became part of it."""
    there = sorted(there, key=lambda one: one[0].number)
    place = there[0][0]
    scales = [scale_at(config, name) for _, name in there]
    each = [dict(slots[name]) for _, name in there]
    if place.cut is not None:
        rows, pieces = place.cut
        return {
            slot: t if slot == "A" else t.chunk(pieces)[rows] for slot, t in each[0].items()
        }, scales[0]
    if place.parts == 1:
        return each[0], scales[0]
    kind = layer_kinds.kind_of(module)
    assert kind is not None
    outputs, inputs = kind.shape(module)[:2]
    for (_, name), of_one, scale in zip(there, each, scales, strict=True):
        pair = {"A", "B"} <= of_one.keys() <= {"A", "B", "m"} and of_one["A"].dim() == of_one[
            "B"
        ].dim() == 2
        if (
            not pair
            or of_one["A"].shape != (scale.rank, inputs)
            or of_one["B"].shape[1] != scale.rank
        ):
            shapes = ", ".join(f"{slot} {tuple(tensor.shape)}" for slot, tensor in of_one.items())
            raise AdapterError(
                f"{where}: {name} has {shapes}; expected a pair of rank {scale.rank} to put into "
                f"{path}"
            )
    starts = _starts(
        [one.number for one, _ in there],
        [len(of_one["B"]) for of_one in each],
        place.parts,
        outputs,
    )
    magnitudes = [of_one["m"] for of_one in each if "m" in of_one]
    if starts is None or len(magnitudes) not in (0, place.parts):
        raise AdapterError(
            f"{where}: {', '.join(name for _, name in there)} are {place.parts} parts of {path} "
            f"({outputs} rows) in this model, and what the file has of them does not fill it"
        )
    total = PairScale(sum(scale.rank for scale in scales), 1.0, scales[0].rslora)
    total = total._replace(alpha=scales[0].value / total.value)
    up = each[0]["B"].new_zeros(outputs, total.rank)
    column = 0
    for start, of_one, scale in zip(starts, each, scales, strict=True):
        B, factor = of_one["B"], 1.0 if scale == scales[0] else scale.value / scales[0].value
        up[start : start + len(B), column : column + B.shape[1]] = B if factor == 1 else factor * B
        column += B.shape[1]
    joined = {"A": torch.cat([of_one["A"] for of_one in each]), "B": up}
    return (joined | {"m": torch.cat(magnitudes)} if magnitudes else joined), total


def _starts(numbers: list[int], rows: list[int], parts: int, outputs: int) -> list[int] | None:
    """The first row of each part in the file; None if a size is unknown or they do not fit."""
    if len(numbers) == parts:
        return [sum(rows[:n]) for n in range(parts)] if sum(rows) == outputs else None
    return [number * rows[0] for number in numbers] if set(rows) == {outputs / parts} else None


def _with_scales(
    config: Mapping[str, Any], scales: Mapping[str, PairScale], paths: Iterable[str]
) -> Mapping[str, Any]:
    """The config that says these ranks and alphas, in as few patterns as can be."""
    ends: dict[str, set[PairScale]] = {}
    for path, scale in scales.items():
        ends.setdefault(_end(path), set()).add(scale)
    mixed = {_end(path) for path in paths if path not in scales} | {
        end for end, those in ends.items() if len(those) > 1
    }
    for field, of in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
        said = {}
        for path, scale in scales.items():
            value = getattr(scale, of)
            if getattr(scale_at(config, path), of) != value:
                key = (
                    re.escape(path)
                    if _end(path) in mixed
                    else rf"(?:{re.escape(_end(path))})(?:\.\d+)?"
                )
                said[f"^{key}" if _end(path) in mixed else key] = (
                    int(value) if float(value).is_integer() else value
                )
        if said:
            config = {**config, field: said | dict(config.get(field) or {})}
    return config


def _end(path: str) -> str:
    """The last name of a path, an expert's number aside."""
    return re.sub(r"\.\d+$", "", path).rpartition(".")[2]
