"""lorakin's own part of an adapter's directory, `lorakin.json` and `lorakin.safetensors`, as it is read beside PEFT's files."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lorakin.errors import AdapterError, LorakinWarning
from lorakin.family import all_finite
from lorakin.storage import peft_format
from lorakin.storage.fingerprint import is_fingerprint

CONFIG, TENSORS, OLD_TENSORS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
OWN, OWN_TENSORS = "lorakin.json", "lorakin.safetensors"
FORMAT, CHECKSUM = 1, "sha256"
KNOWN = {
    "format", "members", "beside", "patterns", "tensors", "projection", "base", "buffers", "whole", "state", CHECKSUM,
}  # fmt: skip
"""What `lorakin.json` may say; a file of a later version that says more has another format."""


class Beside(NamedTuple):
    """What stands beside PEFT's files.

    own: None where there is no such part, or where a file of PEFT's was written anew without it.
    base: the fingerprint of the base that it was made on, where one is remembered; it counts in both cases.
    rewritten: the file that was written anew.
    is_sound: whether it is as it was written, as far as it says.
    """

    own: peft_format.Own | None = None
    base: Mapping[str, Any] | None = None
    rewritten: str | None = None
    is_sound: bool = True


def read_beside(path: Path, found: Mapping[str, bytes]) -> Beside:
    """lorakin's own part of the files `found` (name → content) in the directory `path`.

    Raises:
        AdapterError: it is damaged, or from a later version.
    """
    if OWN not in found:
        return Beside()
    own = parsed(path / OWN, found[OWN])
    if own.get("format") != FORMAT:
        raise AdapterError(f"{path / OWN}: format {own.get('format')!r}, this version reads {FORMAT}; update lorakin")
    if unknown := sorted(own.keys() - KNOWN):
        raise AdapterError(
            f"{path / OWN}: it says {unknown[0][:80]!r}, which no lorakin writes in format {FORMAT}; it is damaged"
        )
    beside, base = own.get("beside") or {}, own.get("base")
    if not isinstance(beside, dict) or any(name not in (TENSORS, OWN_TENSORS) for name in beside):
        raise AdapterError(f"{path / OWN} names files that are not an adapter's: {str(beside)[:80]}")
    if base is not None and not is_fingerprint(base):
        raise AdapterError(f"{path / OWN}: what it says of the base is no fingerprint: {str(base)[:80]}")
    others = [name for name, digest in beside.items() if name not in found or sha256(found[name]) != digest]
    if others == [OWN_TENSORS] and OWN_TENSORS in found:  # which lorakin alone writes
        raise AdapterError(
            f"{path}: {OWN_TENSORS} is damaged: it is not the one that was saved here. To have what PEFT's files say, and "
            f"neither the method nor what training remembers, remove {OWN} and {OWN_TENSORS}"
        )
    is_sound = own.get(CHECKSUM, checksum(own)) == checksum(own)
    if not others:
        return Beside(_own_part(path, own, found.get(OWN_TENSORS)), base, None, is_sound)
    if not is_sound:
        raise unsound(path)
    warnings.warn(
        f"{path}: {others[0]} is not the one that {OWN} was written with, so what {OWN} says is left aside, but for the base "
        "that it names, and the adapter is what PEFT's files say",
        LorakinWarning,
        stacklevel=4,
    )
    return Beside(None, base, others[0])


def unsound(path: Path) -> AdapterError:
    """What to say of a `lorakin.json` that is not as it was written."""
    return AdapterError(
        f"{path / OWN}: it is damaged, or was edited: its {CHECKSUM} is of something else. To have what PEFT's files say "
        "alone, remove it"
    )


def _own_part(path: Path, own: Mapping[str, Any], content: bytes | None) -> peft_format.Own:
    """What `lorakin.json` says, with the tensors in `content`, those of `lorakin.safetensors`."""
    try:
        more = tensors_in(content) if content is not None else {}
        members = tuple((str(entry["member"]), dict(entry["settings"])) for entry in own["members"])
        tensors = _unpacked(own["tensors"], more, path) if "tensors" in own else None
        if tensors is not None and not all(isinstance(t, Tensor) for slots in tensors.values() for t in slots.values()):
            raise AdapterError(f"{path / OWN}: its tensors are none: expected the slots of each module, each with a tensor")
        state = _unpacked(own["state"], more, path) if "state" in own else None
        if state is not None and not (isinstance(state.get("steps"), int) and isinstance(state.get("rules"), list)):
            raise AdapterError(f"{path / OWN}: its state is none: expected steps, a number, and rules, a list")
        buffers = _unpacked(own.get("buffers", {}), more, path)
        if not all(isinstance(t, Tensor) for t in buffers.values()):
            raise AdapterError(f"{path / OWN}: its buffers are none: expected a tensor for each name")
        whole = own.get("whole")
        if whole is not None and not (isinstance(whole, list) and all(isinstance(name, str) for name in whole)):
            raise AdapterError(f"{path / OWN}: what it trains whole is no list of names: {str(whole)[:80]}")
        patterns = own.get("patterns", [{}, {}])
        if len(patterns) != 2 or not all(isinstance(pattern, dict) for pattern in patterns):
            raise AdapterError(f"{path / OWN}: its patterns are none: {str(patterns)[:80]}")
        if spoilt := [key for key, t in more.items() if t.is_floating_point() and not all_finite(t)]:
            raise AdapterError(f"{path}: tensor {spoilt[0]} of {OWN_TENSORS} holds NaN or infinity")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: {OWN} or {OWN_TENSORS} is damaged ({error})") from None
    return peft_format.Own(members, tensors, patterns, state, own.get("projection"), own.get("base"), buffers, whole)


def checksum(own: Mapping[str, Any]) -> str:
    """SHA-256 of what `lorakin.json` says, but for this checksum, however it is laid out."""
    return sha256(json.dumps({key: value for key, value in own.items() if key != CHECKSUM}, sort_keys=True).encode())


def packed(value: Any, key: str, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    """`value` as JSON, its tensors put into `tensors` and named in their stead; one object twice is written once."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = key
            tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": seen[id(value)]}
    if isinstance(value, Mapping):
        return {str(k): packed(v, f"{key}/{k}", tensors, seen) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [packed(v, f"{key}/{n}", tensors, seen) for n, v in enumerate(value)]
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor], path: Path) -> Any:
    """What `packed` was given."""
    if isinstance(value, dict) and value.keys() == {"tensor"}:
        if value["tensor"] not in tensors:
            raise AdapterError(f"{path}: {OWN_TENSORS} lacks {value['tensor']}")
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: _unpacked(item, tensors, path) for key, item in value.items()}
    return [_unpacked(item, tensors, path) for item in value] if isinstance(value, list) else value


def tensors_in(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the order of their names: `load` gives another one each time."""
    return dict(sorted(safetensors.torch.load(content).items()))


def sha256(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        AdapterError: no such file, no JSON, no object, or a key that stands twice.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise no_json(path) from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error})") from None
    return parsed(path, content)


def no_json(path: Path) -> AdapterError:
    """What to say where the file `path` is not there."""
    if named := sorted(inner.parent.name for inner in path.parent.glob(f"*/{path.name}")):
        return AdapterError(f"{path.parent} holds adapters in directories of their own ({', '.join(named)}); load one of them")
    return AdapterError(f"{path.parent} has no {path.name}; is it an adapter's directory?")


def parsed(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object in a file's `content`; raises `AdapterError` if it is none."""
    try:
        said = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(said, dict):
        raise AdapterError(f"{path} holds {type(said).__name__}, expected an object")
    return said


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no key stands twice: readers differ in which one they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands in it twice")
    return content
