"""An adapter, its method and its sizes in words: for `print`, for the command line, and for a model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lorakin.family import Member, Method
from lorakin.inject.counts import (
    Whether,
    bytes_of,
    devices_of,
    hung_of,
    numbers,
    parameter_counts,
    requires_grad,
    tensors_of,
)
from lorakin.inject.inserted import InsertedAdapter

TRAINING: dict[Whether, str] = {
    True: "trains",
    False: "frozen",
    "irregular": "trains in part (irregular)",
}


def in_words(method: Method) -> str:
    """A method with its settings, such as `dora on lora (rank 16, alpha 32, dropout 0, rslora False)`."""
    pair = method.parametrisation
    if pair in method.members:
        return ", ".join(map(member_in_words, method.members))
    members = (member_in_words(member, pair.setting_names()) for member in method.members)
    return f"{', '.join(members)} on {member_in_words(pair)}"


def member_in_words(member: Member, without: Collection[str] = ()) -> str:
    """A member with those of its settings that are set, but for some that are said elsewhere."""
    settings = {name: value for name, value in settings_of(member).items() if name not in without}
    said = {k: v for k, v in settings.items() if v is not None and not isinstance(v, Mapping)}
    if not said:
        return member.word
    return f"{member.word} ({', '.join(f'{k} {v:g}' if isinstance(v, float) else f'{k} {v}' for k, v in said.items())})"


def settings_of(member: Member) -> dict[str, Any]:
    """A member's settings by name."""
    return {field.name: getattr(member, field.name) for field in dataclasses.fields(member)}  # type: ignore[arg-type]


def module_names(paths: Iterable[str]) -> list[str]:
    """The last words of paths, once each, in order; of a stack's matrices the stack's."""
    named = ([part for part in path.split(".") if not part.isdigit()] for path in paths)
    return list(dict.fromkeys(parts[-1] for parts in named if parts))


def ranks_in_words(adapter: InsertedAdapter) -> str:
    """`rank 8`, or `rank 4 to 16` where modules have ranks of their own; empty where the method has none."""
    ranks = sorted(
        {
            rank
            for method in adapter.placement.methods.values()
            if (rank := method.setting("rank")) is not None
        }
    )
    if not ranks:
        return ""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"


def biases_in_words(adapter: InsertedAdapter) -> str:
    """`4 biases`, those that it trains."""
    number = len(adapter.placement.biases)
    return f"{number:,} bias{'' if number == 1 else 'es'}"


def state_in_words(adapter: InsertedAdapter) -> str:
    """`active`, `inactive`, `merged`, `disabled` or `removed`, and its scale if that is not 1."""
    attached = hung_of(adapter)
    if not adapter.is_present:
        return "removed"
    states = {"merged": "merged", "off": "disabled", "active": "active"}
    word = next(
        (
            word
            for state, word in states.items()
            if any(adapter.name in getattr(h, state) for h in attached)
        ),
        "inactive",
    )
    return word if adapter.merging.scale == 1 else f"{word} at scale {adapter.merging.scale:g}"


def described(adapter: InsertedAdapter) -> str:
    """The adapter in a few lines: method, modules, trained parameters, memory, state."""
    tensors = tensors_of(adapter)
    trained, total = (
        sum(numbers(p) for p in tensors if p.requires_grad),
        parameter_counts(adapter.model)[1],
    )
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    places, own_ranks = module_names(adapter.placement.methods), ranks_in_words(adapter)
    lines = [
        f"adapter {adapter.name!r}: {in_words(adapter.method)}{f'; {own_ranks}' if ' to ' in own_ranks else ''}",
        f"modules: {len(adapter.placement.methods)}{f' ({listed(places)})' if places else ''}"
        + (
            f"; trained whole: {listed(adapter.placement.copies)}"
            if adapter.placement.copies
            else ""
        )
        + (f"; {biases_in_words(adapter)}" if adapter.placement.biases else ""),
        f"trains: {share(trained, total)}",
        f"memory: {size_in_words(bytes_of(tensors))} in {', '.join(dtypes) or 'no tensors'}"
        + (f" on {', '.join(devices_of(tensors))}" if tensors else ""),
        f"state: {state_in_words(adapter)}, {TRAINING[requires_grad(adapter)]}",
    ]
    return "\n  ".join(lines if adapter.is_present else [lines[0], "state: removed"])


def in_one_line(adapter: InsertedAdapter) -> str:
    """The adapter in a line, for `repr`."""
    tensors = tensors_of(adapter)
    trained, total = (
        sum(numbers(p) for p in tensors if p.requires_grad),
        parameter_counts(adapter.model)[1],
    )
    places = count(len(adapter.placement.methods), "module")
    if adapter.placement.copies:
        places += f" and {len(adapter.placement.copies)} whole"
    parts = [repr(adapter.name), str(adapter.placement.method), places]
    if adapter.is_present:
        parts.append(f"{share(trained, total)} train" if trained else "frozen")
    return f"Adapter({', '.join([*parts, state_in_words(adapter)])})"


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names, and how many more there are than are named."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def share(part: int, whole: int) -> str:
    """`1,792 of 30,000 parameters (5.97%)`."""
    return f"{part:,} of {whole:,} parameters" + (f" ({part / whole:.2%})" if whole else "")


def size_in_words(size: int) -> str:
    """Bytes, and as KiB or MiB."""
    unit, name = (2**20, "MiB") if size >= 2**20 else (2**10, "KiB")
    return f"{size:,} bytes ({size / unit:,.1f} {name})"


def count(number: int, what: str) -> str:
    """`1 module`, `2 modules`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
