"""lorakin's part of an adapter's directory: `lorakin.json` and `lorakin.safetensors`.

They hold what PEFT's files cannot say: the members with their settings, tensors that PEFT has no
form for, what training remembers, and the base's fingerprint.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lorakin.errors import AdapterError, LorakinWarning, SettingError
from lorakin.family import Member, all_finite, member_named, members
from lorakin.storage.document import Document
from lorakin.storage.fingerprint import is_fingerprint
from lorakin.storage.json_files import parsed, sha256
from lorakin.storage.references import PEFT_TENSORS, Packing, TensorReference, unpacked
from lorakin.storage.schema import Check, SchemaError, checked, short_repr

CONFIG, TENSORS, OLD_TENSORS = "adapter_config.json", PEFT_TENSORS, "adapter_model.bin"
LORAKIN_JSON, LORAKIN_TENSORS = "lorakin.json", "lorakin.safetensors"
FORMAT, CHECKSUM = 2, "sha256"
FORMATS = (1, FORMAT)
"""1: every tensor of this part is in `lorakin.safetensors`. 2: one may be a range of PEFT's."""

MAY_CHANGE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save",
    "peft_version", "revision", "target_modules", "task_type",
}  # fmt: skip
"""Fields of `adapter_config.json` that may change without making another adapter of it.

PEFT rewrites the file with values of its own, and people edit it. Which modules are adapted is
known from the tensors.
"""


@dataclasses.dataclass(frozen=True)
class MemberEntry:
    """One member in `lorakin.json`."""

    member: str
    settings: dict[str, Any]
    package: str | None = None
    """The package to install for a member that is not lorakin's."""

    @classmethod
    def of(cls, member: Member) -> MemberEntry:
        """Returns the entry of a member."""
        settings: dict[str, Any] = dataclasses.asdict(member)  # type: ignore[call-overload]
        return cls(member.word, settings, _package_of(type(member)))

    def build(self) -> Member:
        """Returns the member with its settings; raises `SettingError` if it is not installed."""
        if self.member not in {member.word for member in members()}:
            if self.package is not None:
                raise SettingError(
                    f"{self.member!r} is a member of the package {self.package!r}, which is not "
                    f"installed here (pip install {self.package}), or does not name it among its "
                    "entry points of lorakin.members"
                )
            raise SettingError(
                f"this version has no member {self.member!r}. If it is your own, import the module "
                "that registers it (lorakin.register) before you load the adapter"
            )
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in self.settings.items()}
        return member_named(self.member)(**settings)

    def as_json(self) -> dict[str, Any]:
        """Returns the entry for `lorakin.json`."""
        package = {} if self.package is None else {"package": self.package}
        return {"member": self.member, "settings": self.settings, **package}


def _package_of(kind: type[Member]) -> str | None:
    """Returns the package to install for this member; None for lorakin's, or without a package."""
    top = kind.__module__.partition(".")[0]
    if top == __name__.partition(".")[0]:
        return None
    return next(iter(packages_distributions().get(top, ())), None)


def _is_state(value: Mapping[str, Any]) -> bool:
    return type(value.get("steps")) is int and isinstance(value.get("rules"), list)


State = Annotated[dict[str, Any], Check("steps, a number, and rules, a list", _is_state)]
Fingerprint = Annotated[dict[str, Any], Check("a fingerprint of a base", is_fingerprint)]


@dataclasses.dataclass(frozen=True)
class LorakinJson:
    """The fields that `lorakin.json` may have, with their types."""

    format: Literal[1, 2]
    members: list[MemberEntry]
    beside: dict[Literal["adapter_model.safetensors", "lorakin.safetensors"], str] | None = None
    config: dict[str, Any] | None = None
    patterns: tuple[dict[str, Any], dict[str, Any]] | None = None
    tensors: dict[str, dict[str, TensorReference]] | None = None
    projection: str | None = None
    base: Fingerprint | None = None
    buffers: dict[str, TensorReference] | None = None
    whole: list[str] | None = None
    state: State | None = None
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class LorakinPart:
    """What lorakin's part of the files says of an adapter."""

    members: Sequence[MemberEntry]
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None
    """Path → slot → tensor, if PEFT's file holds them in another form."""
    patterns: Sequence[Mapping[str, Any]] = ({}, {})
    """The ranks and alphas of single modules, where there are `tensors`."""
    state: Mapping[str, Any] | None = None
    """What training remembers."""
    projection: str | None = None
    """Checksum of the pair that all modules share."""
    base: Mapping[str, Any] | None = None
    """The base's fingerprint."""
    buffers: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    whole: Collection[str] | None = None
    """Paths of the modules that are trained whole, where PEFT's file holds more of them."""


class ReadLorakinPart(NamedTuple):
    """lorakin's part of a directory, as it was read beside PEFT's files."""

    part: LorakinPart | None = None
    """What it says; None if there is none, or if a file of PEFT's was written again since."""
    base: Mapping[str, Any] | None = None
    """The fingerprint of the base, which counts in both cases."""
    rewritten: str | None = None
    """The file that was written again by another program."""
    is_sound: bool = True
    """Whether `lorakin.json` matches its checksum; True in earlier files, which have none."""
    config: Mapping[str, Any] | None = None
    """The `identifying_fields` of `adapter_config.json` at saving; None in earlier files."""


def json_and_tensors_of(
    document: Document,
    peft: Mapping[str, Tensor],
    prefix: str,
    *,
    with_slots: bool,
    projection: str | None,
    base: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what `lorakin.json` says of a document, and the tensors of `lorakin.safetensors`.

    Args:
        document: the adapter.
        peft: the tensors of PEFT's file, which are not written again.
        prefix: what their keys begin with.
        with_slots: PEFT's file holds the modules' tensors in another form.
        projection: checksum of the pair that all modules share, if PEFT's file holds one.
        base: the base's fingerprint.
    """
    packing, placement = Packing(peft, prefix), document.placement
    content: dict[str, Any] = {
        "format": FORMAT,
        "members": [MemberEntry.of(member).as_json() for member in document.method.members],
    }
    if with_slots:
        content["patterns"] = [dict(placement.rank_pattern), dict(placement.alpha_pattern)]
        content["tensors"] = packing.packed(document.slots, "tensors")
    elif projection is not None:
        content["projection"] = projection
    content["base"] = base
    if document.buffers:
        content["buffers"] = packing.packed(document.buffers, "buffers")
    if document.whole_modules:
        content["whole"] = list(document.whole_modules)
    if document.state is not None:
        content["state"] = packing.packed(document.state, "state")
    return content, packing.tensors


def with_checksums(
    content: Mapping[str, Any], files: Mapping[str, bytes], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what `lorakin.json` says, with checksums of itself and of the files of tensors.

    Args:
        content: see `json_and_tensors_of`.
        files: name → content of the files of tensors.
        config: what `adapter_config.json` says.
    """
    digests = {name: sha256(files[name]) for name in (TENSORS, LORAKIN_TENSORS) if name in files}
    complete = {**content, "beside": digests, "config": identifying_fields(config)}
    return complete | {CHECKSUM: checksum(complete)}


def read_lorakin_part(
    path: Path, files: Mapping[str, bytes], peft: Mapping[str, Tensor]
) -> ReadLorakinPart:
    """Reads lorakin's part of a directory's files.

    Args:
        path: the directory.
        files: name → content of its files.
        peft: the tensors in PEFT's file.

    Raises:
        AdapterError: it is damaged, or from a later version.
    """
    if LORAKIN_JSON not in files:
        return ReadLorakinPart()
    content = parsed(path / LORAKIN_JSON, files[LORAKIN_JSON])
    number = content.get("format")
    if number not in FORMATS or number is True:
        raise AdapterError(
            f"{path / LORAKIN_JSON}: format {short_repr(number)}, this version reads up to "
            f"{FORMAT}; update lorakin"
        )
    try:
        lorakin_json: LorakinJson = checked(LorakinJson, content)
    except SchemaError as error:
        raise AdapterError(f"{path / LORAKIN_JSON}: {error}; it is damaged") from None
    rewritten = [
        name
        for name, digest in (lorakin_json.beside or {}).items()
        if name not in files or sha256(files[name]) != digest
    ]
    # Only lorakin writes this file, so PEFT cannot have replaced it.
    if rewritten == [LORAKIN_TENSORS] and LORAKIN_TENSORS in files:
        raise AdapterError(
            f"{path}: {LORAKIN_TENSORS} is damaged: it is not the one that was saved here. To load "
            "what PEFT's files say, without the method and without what training remembers, remove "
            f"{LORAKIN_JSON} and {LORAKIN_TENSORS}"
        )
    is_sound = lorakin_json.sha256 is None or lorakin_json.sha256 == checksum(content)
    if not rewritten:
        part = _with_tensors(path, lorakin_json, files.get(LORAKIN_TENSORS), peft)
        return ReadLorakinPart(part, lorakin_json.base, None, is_sound, lorakin_json.config)
    if not is_sound:
        raise damaged_error(path)
    warnings.warn(
        f"{path}: {rewritten[0]} is not the one that {LORAKIN_JSON} was written with. So "
        f"{LORAKIN_JSON} is ignored, except for the base that it names, and the adapter is read "
        "from PEFT's files alone",
        LorakinWarning,
        # The caller of `directory.read`'s caller, such as of `lorakin.load`.
        stacklevel=4,
    )
    return ReadLorakinPart(None, lorakin_json.base, rewritten[0])


def damaged_error(path: Path) -> AdapterError:
    """Returns the error for a `lorakin.json` whose checksum does not match."""
    return AdapterError(
        f"{path / LORAKIN_JSON}: it is damaged, or was edited: its {CHECKSUM} does not match. To "
        "load what PEFT's files say alone, remove it"
    )


def identifying_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `adapter_config.json` that say which adapter it is."""
    return {key: value for key, value in config.items() if key not in MAY_CHANGE}


def config_mismatch(
    path: Path, then: Mapping[str, Any], config: Mapping[str, Any]
) -> AdapterError | None:
    """Returns the error for a `config` that is not what was saved in `path`; None if it is.

    Fields that PEFT adds when it writes the file again do not count, nor a field that is empty in
    both.
    """
    for key, value in then.items():
        if (config.get(key) or None) != (value or None):
            now = short_repr(config.get(key)) if key in config else "missing"
            saved = short_repr(value)
            return AdapterError(
                f"{path / CONFIG}: {key} is {now}, and {LORAKIN_JSON} says that {saved} was "
                f"saved: one of the two is damaged, or was edited. Put {saved} back; or, to load "
                f"what {CONFIG} says, without the method, remove {LORAKIN_JSON}"
            )
    return None


def checksum(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a JSON object without its checksum, whatever its formatting."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    return sha256(json.dumps(rest, sort_keys=True).encode())


def tensors_in(content: bytes) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, sorted: `load` has a new order each time."""
    return dict(sorted(safetensors.torch.load(content).items()))


def _with_tensors(
    path: Path, lorakin_json: LorakinJson, content: bytes | None, peft: Mapping[str, Tensor]
) -> LorakinPart:
    """Returns what `lorakin.json` says, with tensors for its references.

    `content` is that of `lorakin.safetensors`, if there is one.
    """
    try:
        stored = tensors_in(content) if content is not None else {}
        with_tensors = {
            name: unpacked(getattr(lorakin_json, name), stored, peft)
            for name in ("tensors", "state", "buffers")
        }
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path}: {LORAKIN_JSON} or {LORAKIN_TENSORS} is damaged ({error})"
        ) from None
    for key, tensor in stored.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise AdapterError(f"{path}: tensor {key} of {LORAKIN_TENSORS} holds NaN or infinity")
    return LorakinPart(
        lorakin_json.members,
        with_tensors["tensors"],
        lorakin_json.patterns or ({}, {}),
        with_tensors["state"],
        lorakin_json.projection,
        lorakin_json.base,
        with_tensors["buffers"] or {},
        lorakin_json.whole,
    )
