"""What an adapter's files say without its base model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakin.family import Member
from lorakin.storage import directory, peft_format


@dataclasses.dataclass(frozen=True)
class Summary:
    """An adapter at a glance. `norms` holds ‖up·down‖ (Frobenius) by module path."""

    path: Path
    member: Member
    base: str | None
    ranks: Mapping[str, int]
    norms: Mapping[str, float]
    whole: tuple[str, ...]
    parameters: int
    size: int

    @property
    def columns(self) -> list[str]:
        """The names of the adapted modules, without their layers."""
        return list(dict.fromkeys(_place(path)[1] for path in self.norms))

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Norms by layer and module name, layers in their order."""
        table: dict[str, dict[str, float]] = {}
        for path, norm in self.norms.items():
            layer, name = _place(path)
            table.setdefault(layer, {})[name] = norm
        return dict(sorted(table.items(), key=lambda item: (not item[0].isdigit(), int(item[0]) if item[0].isdigit() else 0)))

    def headline(self) -> dict[str, str]:
        """The lines above the table."""
        settings = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in _settings(self.member).items())
        ranks = sorted(set(self.ranks.values()))
        names = self.columns
        lines = {
            "member": f"{self.member.word} ({settings})",
            "base": self.base or "not recorded",
            "targets": f"{len(self.norms)} modules: {', '.join(names[:10])}{' …' if len(names) > 10 else ''}",
            "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
            "parameters": f"{self.parameters:,}",
            "size": f"{self.size / 2**20:.2f} MiB in {self.path}",
        }
        return lines | ({"whole": ", ".join(self.whole)} if self.whole else {})

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": str(self.path),
            "member": self.member.word,
            "settings": _settings(self.member),
            "base": self.base,
            "parameters": self.parameters,
            "bytes": self.size,
            "modules_to_save": list(self.whole),
            "modules": {path: {"rank": self.ranks[path], "norm": norm} for path, norm in self.norms.items()},
        }


def summarise(path: Path) -> Summary:
    """Read the adapter in the directory `path`.

    Raises:
        AdapterError: it cannot be read, or is of a kind that this version does not know.
    """
    files = directory.read(path)
    found = peft_format.pairs_of(files.config, files.tensors, files.own, str(path))
    pairs = {where: member.pair({slot: t.float() for slot, t in slots.items()}) for where, (member, slots) in found.items()}
    form = peft_format.check_config(files.config, str(path))
    return Summary(
        path=path,
        member=peft_format.member_of(form, files.config, files.own, str(path)),
        base=files.config.get("base_model_name_or_path"),
        ranks={where: pair.down.shape[0] for where, pair in pairs.items()},
        norms={where: pair.norm() for where, pair in pairs.items()},
        whole=tuple(files.config.get("modules_to_save") or ()),
        parameters=sum(tensor.numel() for tensor in files.tensors.values()),
        size=sum(file.stat().st_size for file in path.glob("adapter_*")),
    )


def _settings(member: Member) -> dict[str, Any]:
    return {field.name: getattr(member, field.name) for field in dataclasses.fields(member)}  # type: ignore[arg-type]


def _place(path: str) -> tuple[str, str]:
    """A module's layer and its name inside the layer."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", path)
    return (match[1], match[2]) if match else ("–", path)
