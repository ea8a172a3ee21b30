"""What an adapter's files say without its base model."""

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
from lorakin.storage.peft.forms import TARGET_PARAMETERS
from lorakin.storage.peft.without_base import pairs_of
from lorakin.storage.schema import Check, SchemaError, checked

IMPORTANCE = "importance.json"
"""What `lorakin train` writes beside an adapter whose modules a probe chose: path → share."""
Share = Annotated[float, Check("a number from 0 to 1e30", lambda share: 0 <= share <= 1e30)]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Summary:
    """An adapter at a glance; `norms` has the Frobenius norm of up·down by module's path."""

    path: Path
    method: Method
    base: str | None
    ranks: Mapping[str, int]
    norms: Mapping[str, float]
    whole_modules: tuple[str, ...]
    parameters: int
    size: int
    pairs: Mapping[str, Pair] = dataclasses.field(repr=False)
    tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Path → how many rows of tokens are trained there."""
    has_experts: bool = False
    """Modules whose path ends in a number are matrices of a stack of experts."""
    bias: str = "none"
    """Which biases it holds, in PEFT's words."""

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
        """`norms`, with that of a whole stack in place of its experts'."""
        squares: dict[str, float] = {}
        for path, norm in self.norms.items():
            squares[self._stack_of(path)] = squares.get(self._stack_of(path), 0.0) + norm**2
        return {path: math.sqrt(square) for path, square in squares.items()}

    def _stack_of(self, path: str) -> str:
        stack, _, number = path.rpartition(".")
        return stack if self.has_experts and number.isdigit() else path

    def headline(self) -> dict[str, str]:
        """The lines above the table."""
        ranks = sorted(set(self.ranks.values()))
        names = self.columns
        lines: dict[str, str] = {
            "member" if len(self.method.members) == 1 else "members": "; ".join(
                map(member_in_words, self.method.members)
            ),
            **(
                {}
                if self.method.parametrisation in self.method.members
                else {"pair": member_in_words(self.method.parametrisation)}
            ),
            "base": self.base or "not recorded",
            "targets": f"{len(self.ranks)} modules{': ' * bool(names)}{', '.join(names[:10])}"
            + (" …" if len(names) > 10 else ""),
            **(
                {"rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"}
                if ranks
                else {}
            ),
            "numbers": f"{self.parameters:,} in the file",
            "size": f"{self.size / 2**20:.2f} MiB in {self.path}",
        }
        own = self.method.with_own_pair(list(self.ranks))
        if len(own) < len(self.ranks):
            lines["sharing"] = f"{len(own)} of {len(self.ranks)} modules have a pair of their own"
        if self.tokens:
            lines["tokens"] = ", ".join(
                f"{count} rows of {where}" for where, count in self.tokens.items()
            )
        lines |= {"whole": ", ".join(self.whole_modules)} if self.whole_modules else {}
        return lines | ({} if self.bias == "none" else {"biases": self.bias})

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
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
    """Read the adapter in the directory `path`.

    Raises:
        AdapterError: it cannot be read, or is of a kind that this version does not know.
    """
    files = directory.read(path)
    placement, pairs = pairs_of(files.config, files.tensors, files.lorakin_part, str(path))
    files.check_lorakin_part()
    known = {
        where: getattr(method.parametrisation, "rank", 0)
        for where, method in placement.methods.items()
    }
    return Summary(
        path=path,
        method=placement.method,
        base=files.config.get("base_model_name_or_path"),
        ranks=known | {where: pair.down.shape[0] for where, pair in pairs.items()},
        norms={where: pair.norm() for where, pair in pairs.items()},
        whole_modules=tuple(files.config.get("modules_to_save") or ()),
        bias=files.config.get("bias") or "none",
        parameters=sum(tensor.numel() for tensor in files.tensors.values()),
        size=sum(file.stat().st_size for file in path.glob("adapter_*")),
        pairs=pairs,
        tokens=token_rows.counts(files.tensors),
        has_experts=bool(files.config.get(TARGET_PARAMETERS)),
    )


def importance_in(folder: Path) -> dict[str, float]:
    """Path → share of the importance that a probe wrote into an adapter's directory; {} without it.

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
    """Values of modules, by path, as layer → module name → value, layers in their order."""
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
    """A module's layer and its name inside the layer.

    >>> layer_and_name("model.layers.3.self_attn.q_proj")
    ('3', 'self_attn.q_proj')
    """
    match = re.search(r"(?:^|\.)([0-9]{1,9})\.(.+)$", path)
    return (match[1], match[2]) if match else ("–", path)
