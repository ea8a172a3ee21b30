"""Summarises an adapter's files without its base model, for `lorakin inspect`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from lorakin.errors import AdapterError
from lorakin.family import Method, Pair
from lorakin.inject.description import member_in_words, settings_of
from lorakin.storage import directory
from lorakin.storage.json_files import read_json
from lorakin.storage.peft import token_rows
from lorakin.storage.peft.formats import TARGET_PARAMETERS
from lorakin.storage.peft.without_base import pairs_of
from lorakin.storage.schema import Check, SchemaError, checked

IMPORTANCE = "importance.json"
"""What `lorakin train` writes beside an adapter whose modules a probe chose: path → share."""
Share = Annotated[float, Check("a number from 0 to 1e30", lambda share: 0 <= share <= 1e30)]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Summary:
    """An adapter at a glance."""

    path: Path
    method: Method
    base: str | None
    """The base model's name, if the config has it."""
    ranks: Mapping[str, int]
    norms: Mapping[str, float]
    """Path of a module → Frobenius norm of up·down."""
    whole_modules: tuple[str, ...]
    """Paths of the modules that are trained whole (PEFT's `modules_to_save`)."""
    parameters: int
    size: int
    """Bytes of PEFT's files."""
    pairs: Mapping[str, Pair] = dataclasses.field(repr=False)
    tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Path → how many token rows are trained there."""
    has_experts: bool = False
    """Whether modules with a path that ends in a number are matrices of a stack of experts."""
    bias: str = "none"
    """Which biases it holds, by PEFT's `bias`."""

    @property
    def has_gain(self) -> bool:
        """Whether there are magnitudes, a gain over each pair, which `norms` leave out."""
        return any("gain" in member.decides for member in self.method.members)

    @property
    def columns(self) -> list[str]:
        """The names of the adapted modules, without their layers; a stack of experts is one."""
        return list(dict.fromkeys(layer_and_name(self._stack_of(path))[1] for path in self.ranks))

    @property
    def norms_by_stack(self) -> dict[str, float]:
        """`norms`, with the norm of a stack of experts in place of its experts' norms."""
        squares: dict[str, float] = {}
        for path, norm in self.norms.items():
            stack = self._stack_of(path)
            squares[stack] = squares.get(stack, 0.0) + norm**2
        return {path: math.sqrt(square) for path, square in squares.items()}

    def _stack_of(self, path: str) -> str:
        stack, _, number = path.rpartition(".")
        return stack if self.has_experts and number.isdigit() else path

    def headline(self) -> dict[str, str]:
        """Returns the lines above the table: label → text."""
        members, pair = self.method.members, self.method.parametrisation
        label = "member" if len(members) == 1 else "members"
        lines = {label: "; ".join(map(member_in_words, members))}
        if pair not in members:
            lines["pair"] = member_in_words(pair)
        lines["base"] = self.base or "not recorded"

        names = self.columns
        listed = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
        lines["targets"] = f"{len(self.ranks)} modules{': ' * bool(names)}{listed}"
        if ranks := sorted(set(self.ranks.values())):
            lines["rank"] = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines["parameters"] = f"{self.parameters:,} in the file"
        lines["size"] = f"{self.size / 2**20:.2f} MiB in {self.path}"

        private = self.method.with_own_pair(list(self.ranks))
        if len(private) < len(self.ranks):
            lines["sharing"] = (
                f"{len(private)} of {len(self.ranks)} modules have a pair of their own"
            )
        if self.tokens:
            lines["tokens"] = ", ".join(
                f"{count} rows of {path}" for path, count in self.tokens.items()
            )
        if self.whole_modules:
            lines["whole"] = ", ".join(self.whole_modules)
        if self.bias != "none":
            lines["biases"] = self.bias
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Returns the summary as `lorakin inspect --json` prints it."""
        return {
            "path": str(self.path),
            "member": self.method.words,
            "settings": {member.word: settings_of(member) for member in self.method.members},
            "base": self.base,
            "parameters": self.parameters,
            "bytes": self.size,
            "modules_to_save": list(self.whole_modules),
            "trainable_tokens": dict(self.tokens),
            "bias": self.bias,
            "pair": settings_of(self.method.parametrisation),
            "modules": {
                path: {"rank": rank, "norm": self.norms.get(path)}
                for path, rank in self.ranks.items()
            },
        }


def summarise(path: Path) -> Summary:
    """Reads the adapter in the directory `path`.

    Raises:
        AdapterError: it cannot be read, or is of a kind that this version does not know.
    """
    files = directory.read(path)
    placement, pairs = pairs_of(files.config, files.tensors, files.lorakin_part, str(path))
    files.check_lorakin_part()
    # Where the pair cannot be formed without the base, the rank is the method's.
    ranks = {
        module: getattr(method.parametrisation, "rank", 0)
        for module, method in placement.methods.items()
    }
    return Summary(
        path=path,
        method=placement.method,
        base=files.config.get("base_model_name_or_path"),
        ranks=ranks | {module: pair.down.shape[0] for module, pair in pairs.items()},
        norms={module: pair.norm() for module, pair in pairs.items()},
        whole_modules=tuple(files.config.get("modules_to_save") or ()),
        bias=files.config.get("bias") or "none",
        parameters=sum(tensor.numel() for tensor in files.tensors.values()),
        size=sum(file.stat().st_size for file in path.glob("adapter_*")),
        pairs=pairs,
        tokens=token_rows.counts(files.tensors),
        has_experts=bool(files.config.get(TARGET_PARAMETERS)),
    )


def importance_in(folder: Path) -> dict[str, float]:
    """Returns each module's share of the importance by a probe, by path; {} without a probe.

    Raises:
        AdapterError: the file holds something else.
    """
    path = folder / IMPORTANCE
    if not path.exists():
        return {}
    try:
        return checked(dict[str, Share], read_json(path))  # type: ignore[no-any-return]
    except (SchemaError, AdapterError) as error:
        raise AdapterError(f"{path} cannot be read ({error}); remove it to probe again") from None


def by_layer(values: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Returns values of modules as layer → module name → value, with layers in their order."""
    table: dict[str, dict[str, T]] = {}
    for path, value in values.items():
        layer, name = layer_and_name(path)
        table.setdefault(layer, {})[name] = value
    return dict(
        sorted(
            table.items(),
            key=lambda item: (not item[0].isdigit(), int(item[0]) if item[0].isdigit() else 0),
        )
    )


def layer_and_name(path: str) -> tuple[str, str]:
    """Returns a module's layer and its name inside the layer.

    >>> layer_and_name("model.layers.3.self_attn.q_proj")
    ('3', 'self_attn.q_proj')
    """
    match = re.search(r"(?:^|\.)([0-9]{1,9})\.(.+)$", path)
    return (match[1], match[2]) if match else ("–", path)
