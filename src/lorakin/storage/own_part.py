"""lorakin's own part of an adapter's directory, `lorakin.json` and `lorakin.safetensors`, as it is read beside PEFT's files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lorakin.errors import AdapterError, LorakinWarning
from lorakin.family import all_finite
from lorakin.storage import files, peft_format
from lorakin.storage.fields import misfit
from lorakin.storage.fingerprint import is_fingerprint
from lorakin.storage.schema import Check, shown

CONFIG, TENSORS, OLD_TENSORS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
OWN, OWN_TENSORS = "lorakin.json", "lorakin.safetensors"
FORMAT, CHECKSUM = 1, "sha256"
KNOWN = {
    "format", "members", "beside", "config", "patterns", "tensors", "projection", "base", "buffers", "whole", "state", CHECKSUM,
}  # fmt: skip
"""What `lorakin.json` may say; a file of a later version that says more has another format."""

ASIDE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_version", "revision",
    "target_modules", "task_type",
}  # fmt: skip
"""What `adapter_config.json` may come to say otherwise: PEFT writes it anew with these in words of its own, and people edit
them. Which modules there are, the tensors say."""

MOST_JSON = 1 << 26
"""Bytes of one of the JSON files: of the largest mixtures some ten million."""


@dataclasses.dataclass(frozen=True)
class _Member:
    member: str
    settings: dict[str, Any]


def _is_state(value: Mapping[str, Any]) -> bool:
    return type(value.get("steps")) is int and isinstance(value.get("rules"), list)


_Named = Annotated[
    dict[Literal["tensor"], str], Check("a tensor's name", lambda value: len(value) == 1)
]
KINDS: Mapping[str, Any] = {
    "members": list[_Member],
    "beside": dict[Literal["adapter_model.safetensors", "lorakin.safetensors"], str],
    "patterns": tuple[dict[str, Any], dict[str, Any]],
    "tensors": dict[str, dict[str, _Named]],
    "state": Annotated[dict[str, Any], Check("steps, a number, and rules, a list", _is_state)],
    "base": dict[str, Any],
    "buffers": dict[str, _Named],
    "whole": list[str],
    "config": dict[str, Any],
    "projection": str,
    CHECKSUM: str,
}
"""Field of lorakin.json -> what it must hold if it is there."""


class Beside(NamedTuple):
    """What stands beside PEFT's files.

    own: None where there is no such part, or where a file of PEFT's was written anew without it.
    base: the fingerprint of the base that it was made on, where one is remembered; it counts in both cases.
    rewritten: the file that was written anew.
    is_sound: whether it is as it was written, as far as it says.
    config: what `adapter_config.json` said then, but for what is `ASIDE`; None in earlier files.
    """

    own: peft_format.Own | None = None
    base: Mapping[str, Any] | None = None
    rewritten: str | None = None
    is_sound: bool = True
    config: Mapping[str, Any] | None = None


def read_beside(path: Path, found: Mapping[str, bytes]) -> Beside:
    """lorakin's own part of the files `found` (name → content) in the directory `path`.

    Raises:
        AdapterError: it is damaged, or from a later version.
    """
    if OWN not in found:
        return Beside()
    own = parsed(path / OWN, found[OWN])
    if own.get("format") != FORMAT:
        raise AdapterError(
            f"{path / OWN}: format {shown(own.get('format'))}, this version reads {FORMAT}; update lorakin"
        )
    if unknown := sorted(own.keys() - KNOWN):
        raise AdapterError(
            f"{path / OWN}: it says {unknown[0][:80]!r}, which no lorakin writes in format {FORMAT}; it is damaged"
        )
    if reason := misfit(own, KINDS):
        raise AdapterError(f"{path / OWN}: {reason}")
    beside, base = own.get("beside") or {}, own.get("base")
    if base is not None and not is_fingerprint(base):
        raise AdapterError(
            f"{path / OWN}: what it says of the base is no fingerprint: {str(base)[:80]}"
        )
    others = [
        name
        for name, digest in beside.items()
        if name not in found or sha256(found[name]) != digest
    ]
    if others == [OWN_TENSORS] and OWN_TENSORS in found:  # which lorakin alone writes
        raise AdapterError(
            f"{path}: {OWN_TENSORS} is damaged: it is not the one that was saved here. To have what PEFT's files say, and "
            f"neither the method nor what training remembers, remove {OWN} and {OWN_TENSORS}"
        )
    is_sound = own.get(CHECKSUM, checksum(own)) == checksum(own)
    if not others:
        return Beside(
            _own_part(path, own, found.get(OWN_TENSORS)), base, None, is_sound, own.get("config")
        )
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


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `adapter_config.json` that nobody changes without making another adapter of it."""
    return {key: value for key, value in config.items() if key not in ASIDE}


def disagreement(
    path: Path, then: Mapping[str, Any], config: Mapping[str, Any]
) -> AdapterError | None:
    """What to say if `config`, in `adapter_config.json`, is not what was saved in the directory `path`.

    Fields that PEFT adds when it writes the file anew do not count, nor one that is not set in either.
    """
    for key, value in then.items():
        if (config.get(key) or None) != (value or None):
            now = shown(config.get(key)) if key in config else "missing"
            return AdapterError(
                f"{path / CONFIG}: {key} is {now}, and {OWN} says that {shown(value)} was saved: one of the two is damaged, or "
                f"was edited. Put {shown(value)} back; or, to have what {CONFIG} says, without the method, remove {OWN}"
            )
    return None


def _own_part(path: Path, own: Mapping[str, Any], content: bytes | None) -> peft_format.Own:
    """What `lorakin.json` says, with the tensors in `content`, those of `lorakin.safetensors`."""
    try:
        more = tensors_in(content) if content is not None else {}
        members = tuple((str(entry["member"]), dict(entry["settings"])) for entry in own["members"])
        tensors = _unpacked(own["tensors"], more, path) if "tensors" in own else None
        state = _unpacked(own["state"], more, path) if "state" in own else None
        buffers = _unpacked(own.get("buffers", {}), more, path)
        whole, patterns = own.get("whole"), own.get("patterns", [{}, {}])
        if spoilt := [
            key for key, t in more.items() if t.is_floating_point() and not all_finite(t)
        ]:
            raise AdapterError(f"{path}: tensor {spoilt[0]} of {OWN_TENSORS} holds NaN or infinity")
    except (
        SafetensorError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: {OWN} or {OWN_TENSORS} is damaged ({error})") from None
    return peft_format.Own(
        members, tensors, patterns, state, own.get("projection"), own.get("base"), buffers, whole
    )


def checksum(own: Mapping[str, Any]) -> str:
    """SHA-256 of what `lorakin.json` says, but for this checksum, however it is laid out."""
    return sha256(
        json.dumps(
            {key: value for key, value in own.items() if key != CHECKSUM}, sort_keys=True
        ).encode()
    )


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
        content = files.content(path, MOST_JSON)
    except FileNotFoundError:
        raise no_json(path) from None
    except OSError as error:
        raise (
            error
            if isinstance(error, AdapterError)
            else AdapterError(f"{path} cannot be read as JSON ({error})")
        ) from None
    return parsed(path, content)


def no_json(path: Path) -> AdapterError:
    """What to say where the file `path` is not there."""
    if named := sorted(inner.parent.name for inner in path.parent.glob(f"*/{path.name}")):
        return AdapterError(
            f"{path.parent} holds adapters in directories of their own ({', '.join(named)}); load one of them"
        )
    return AdapterError(f"{path.parent} has no {path.name}; is it an adapter's directory?")


def parsed(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object in a file's `content`; raises `AdapterError` if it is none."""
    if len(content) > MOST_JSON:
        raise AdapterError(f"{path} is longer than {MOST_JSON:,} bytes, so it is none")
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
