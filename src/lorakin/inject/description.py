"""An adapter, its method and its sizes in words: for `print`, the command line, and model cards."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from lorakin.family import Member, Method
from lorakin.inject.counts import (
    AllNoneOrSome,
    attachments_by,
    bytes_of,
    devices_of,
    element_count,
    parameter_counts,
    requires_grad,
    tensors_of,
)
from lorakin.inject.inserted import InsertedAdapter

TRAINING: dict[AllNoneOrSome, str] = {
    True: "trains",
    False: "frozen",
    "irregular": "trains in part (irregular)",
}


def in_words(method: Method) -> str:
    """Returns a method with its settings, in words.

    >>> from lorakin import DoRA
    >>> in_words(Method.of(DoRA(rank=8)))
    'dora on lora (rank 8, alpha 32, dropout 0, rslora False, init kaiming)'
    """
    pair = method.parametrisation
    if pair in method.members:
        return ", ".join(map(member_in_words, method.members))
    members = (member_in_words(member, pair.setting_names()) for member in method.members)
    return f"{', '.join(members)} on {member_in_words(pair)}"


def member_in_words(member: Member, without: Collection[str] = ()) -> str:
    """Returns a member with the settings that have a value, except those in `without`."""
    settings = {name: value for name, value in settings_of(member).items() if name not in without}
    shown = {k: v for k, v in settings.items() if v is not None and not isinstance(v, Mapping)}
    if not shown:
        return member.word
    words = (f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
    return f"{member.word} ({', '.join(words)})"


def settings_of(member: Member) -> dict[str, Any]:
    """Returns a member's settings by name."""
    return {field.name: getattr(member, field.name) for field in dataclasses.fields(member)}  # type: ignore[arg-type]


def module_names(paths: Iterable[str]) -> list[str]:
    """Returns the last names in paths, once each, in order.

    >>> module_names(["layers.0.q_proj", "layers.1.q_proj", "mlp.experts.3"])
    ['q_proj', 'experts']
    """
    names = ([part for part in path.split(".") if not part.isdigit()] for path in paths)
    return list(dict.fromkeys(parts[-1] for parts in names if parts))


def ranks_in_words(adapter: InsertedAdapter) -> str:
    """Returns `rank 8`, or `rank 4 to 16` for different ranks; empty if there are none."""
    ranks_of_modules = {m.setting("rank") for m in adapter.placement.methods.values()}
    ranks = sorted(ranks_of_modules - {None})
    if not ranks:
        return ""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"


def biases_in_words(adapter: InsertedAdapter) -> str:
    """Returns how many biases it trains, such as `4 biases`."""
    number = len(adapter.placement.biases)
    return f"{number:,} bias{'' if number == 1 else 'es'}"


def state_in_words(adapter: InsertedAdapter) -> str:
    """Returns `active`, `merged`, `disabled`, `inactive` or `removed`, and a scale other than 1."""
    if not adapter.is_present:
        return "removed"
    words = {"merged": "merged", "off": "disabled", "active": "active"}
    holds = [
        word
        for state, word in words.items()
        if any(adapter.name in getattr(attached, state) for attached in attachments_by(adapter))
    ]
    word = holds[0] if holds else "inactive"
    return word if adapter.effect.scale == 1 else f"{word} at scale {adapter.effect.scale:g}"


def described(adapter: InsertedAdapter) -> str:
    """Returns a few lines: method, modules, trained parameters, memory, state."""
    ranks = ranks_in_words(adapter)
    own_ranks = f"; {ranks}" if " to " in ranks else ""
    title = f"adapter {adapter.name!r}: {in_words(adapter.method)}{own_ranks}"
    if not adapter.is_present:
        return f"{title}\n  state: removed"

    placement, tensors = adapter.placement, tensors_of(adapter)
    names = module_names(placement.methods)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    devices = devices_of(tensors)
    lines = [
        title,
        f"modules: {len(placement.methods)}{f' ({listed(names)})' if names else ''}"
        + (f"; trained whole: {listed(placement.whole_modules)}" if placement.whole_modules else "")
        + (f"; {biases_in_words(adapter)}" if placement.biases else ""),
        f"trains: {share(_trained(tensors), parameter_counts(adapter.model)[1])}",
        f"memory: {size_in_words(bytes_of(tensors))} in {', '.join(dtypes) or 'no tensors'}"
        + (f" on {', '.join(devices)}" if tensors else ""),
        f"state: {state_in_words(adapter)}, {TRAINING[requires_grad(adapter)]}",
    ]
    return "\n  ".join(lines)


def in_one_line(adapter: InsertedAdapter) -> str:
    """Returns the adapter in one line, for `repr`."""
    modules = count(len(adapter.placement.methods), "module")
    if adapter.placement.whole_modules:
        modules += f" and {len(adapter.placement.whole_modules)} whole"
    parts = [repr(adapter.name), str(adapter.placement.method), modules]
    if adapter.is_present:
        trained, total = _trained(tensors_of(adapter)), parameter_counts(adapter.model)[1]
        parts.append(f"{share(trained, total)} train" if trained else "frozen")
    return f"Adapter({', '.join([*parts, state_in_words(adapter)])})"


def _trained(tensors: Iterable[Tensor]) -> int:
    """Returns how many parameters in these tensors train."""
    return sum(element_count(tensor) for tensor in tensors if tensor.requires_grad)


def listed(names: Iterable[str], most: int = 10) -> str:
    """Returns up to `most` names, and how many more there are.

    >>> listed("abc", most=2)
    'a, b and 1 more'
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def share(part: int, total: int) -> str:
    """Returns a part of the parameters in words.

    >>> share(1792, 30000)
    '1,792 of 30,000 parameters (5.97%)'
    """
    return f"{part:,} of {total:,} parameters" + (f" ({part / total:.2%})" if total else "")


def size_in_words(size: int) -> str:
    """Returns a number of bytes in words, also as KiB or MiB.

    >>> size_in_words(1536)
    '1,536 bytes (1.5 KiB)'
    """
    unit, name = (2**20, "MiB") if size >= 2**20 else (2**10, "KiB")
    return f"{size:,} bytes ({size / unit:,.1f} {name})"


def count(number: int, what: str) -> str:
    """Returns a number of things in words.

    >>> count(1, "module"), count(2, "module")
    ('1 module', '2 modules')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"
