"""lorakin's own part of an adapter's directory: `lorakin.json` and `lorakin.safetensors`.

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
from lorakin.storage.schema import Check, Misfit, fitted, shown

CONFIG, TENSORS, OLD_TENSORS = "adapter_config.json", PEFT_TENSORS, "adapter_model.bin"
OWN, OWN_TENSORS = "lorakin.json", "lorakin.safetensors"
FORMAT, CHECKSUM = 2, "sha256"
FORMATS = (1, FORMAT)
"""1: every tensor of our own is in `lorakin.safetensors`. 2: one may be a range of PEFT's."""

ASIDE = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save",
    "peft_version", "revision", "target_modules", "task_type",
}  # fmt: skip
"""Fields of `adapter_config.json` that may change without making another adapter of it.

PEFT writes the file again with words of its own, and people edit it. Which modules are adapted, the
tensors tell.
"""


@dataclasses.dataclass(frozen=True)
class MemberEntry:
    """One member in `lorakin.json`."""

    member: str
    settings: dict[str, Any]
    package: str | None = None
    """What to install for a member that is not lorakin's own."""

    @classmethod
    def of(cls, member: Member) -> MemberEntry:
        """The entry of a member."""
        settings: dict[str, Any] = dataclasses.asdict(member)  # type: ignore[call-overload]
        return cls(member.word, settings, _package_of(type(member)))

    def made(self) -> Member:
        """The member with its settings; raises `SettingError` if it is not installed here."""
        if self.member not in {member.word for member in members()}:
            if self.package is not None:
                raise SettingError(
                    f"{self.member!r} is a member of the package {self.package!r}, which is not "
                    f"installed here: pip install {self.package}"
                )
            raise SettingError(
                f"this version has no member {self.member!r}. If it is your own, import the module "
                "that registers it (lorakin.register) before you load the adapter"
            )
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in self.settings.items()}
        return member_named(self.member)(**settings)

    def as_json(self) -> dict[str, Any]:
        """For `lorakin.json`."""
        package = {} if self.package is None else {"package": self.package}
        return {"member": self.member, "settings": self.settings, **package}


def _package_of(kind: type[Member]) -> str | None:
    """The package to install for this member; None if it is lorakin's, or in no package."""
    top = kind.__module__.partition(".")[0]
    if top == __name__.partition(".")[0]:
        return None
    return next(iter(packages_distributions().get(top, ())), None)


def _is_state(value: Mapping[str, Any]) -> bool:
    return type(value.get("steps")) is int and isinstance(value.get("rules"), list)


State = Annotated[dict[str, Any], Check("steps, a number, and rules, a list", _is_state)]
Fingerprint = Annotated[dict[str, Any], Check("a fingerprint of a base", is_fingerprint)]


@dataclasses.dataclass(frozen=True)
class Said:
    """What `lorakin.json` may say."""

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
class Own:
    """What lorakin's own part says of an adapter."""

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


class Beside(NamedTuple):
    """What stands beside PEFT's files."""

    own: Own | None = None
    """lorakin's part; None if there is none, or if a file of PEFT's was written again since."""
    base: Mapping[str, Any] | None = None
    """The fingerprint of the base, which counts in both cases."""
    rewritten: str | None = None
    """The file that was written again by another program."""
    is_sound: bool = True
    """Whether `lorakin.json` is as it was written, as far as it says."""
    config: Mapping[str, Any] | None = None
    """What `adapter_config.json` said then; None in earlier files."""


def written(
    document: Document,
    peft: Mapping[str, Tensor],
    prefix: str,
    *,
    with_slots: bool,
    projection: str | None,
    base: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `lorakin.json` says of a document, and the tensors of `lorakin.safetensors`.

    Args:
        document: the adapter.
        peft: the tensors of PEFT's file, which are not written again.
        prefix: what their keys begin with.
        with_slots: PEFT's file holds the modules' tensors in another form.
        projection: checksum of the pair that all modules share, if PEFT's file holds one.
        base: the base's fingerprint.
    """
    packing, placement = Packing(peft, prefix), document.placement
    said: dict[str, Any] = {
        "format": FORMAT,
        "members": [MemberEntry.of(member).as_json() for member in document.method.members],
    }
    if with_slots:
        said["patterns"] = [dict(placement.rank_pattern), dict(placement.alpha_pattern)]
        said["tensors"] = packing.packed(document.slots, "tensors")
    elif projection is not None:
        said["projection"] = projection
    said["base"] = base
    if document.buffers:
        said["buffers"] = packing.packed(document.buffers, "buffers")
    if document.copies:
        said["whole"] = list(document.copies)
    if document.state is not None:
        said["state"] = packing.packed(document.state, "state")
    return said, packing.tensors


def sealed(
    said: Mapping[str, Any], contents: Mapping[str, bytes], config: Mapping[str, Any]
) -> dict[str, Any]:
    """What `lorakin.json` says, with checksums of itself and of the files it belongs to.

    Args:
        said: see `written`.
        contents: name → content of the files of tensors beside it.
        config: what `adapter_config.json` says.
    """
    beside = {name: sha256(contents[name]) for name in (TENSORS, OWN_TENSORS) if name in contents}
    own = {**said, "beside": beside, "config": meaning(config)}
    return own | {CHECKSUM: checksum(own)}


def read_beside(path: Path, found: Mapping[str, bytes], peft: Mapping[str, Tensor]) -> Beside:
    """lorakin's own part of a directory's files.

    Args:
        path: the directory.
        found: name → content of its files.
        peft: the tensors in PEFT's file.

    Raises:
        AdapterError: it is damaged, or from a later version.
    """
    if OWN not in found:
        return Beside()
    content = parsed(path / OWN, found[OWN])
    if content.get("format") not in FORMATS or content.get("format") is True:
        raise AdapterError(
            f"{path / OWN}: format {shown(content.get('format'))}, this version reads up to "
            f"{FORMAT}; update lorakin"
        )
    try:
        said: Said = fitted(Said, content)
    except Misfit as misfit:
        raise AdapterError(f"{path / OWN}: {misfit}; it is damaged") from None
    others = [
        name
        for name, digest in (said.beside or {}).items()
        if name not in found or sha256(found[name]) != digest
    ]
    # Only lorakin writes this file, so PEFT cannot have replaced it.
    if others == [OWN_TENSORS] and OWN_TENSORS in found:
        raise AdapterError(
            f"{path}: {OWN_TENSORS} is damaged: it is not the one that was saved here. To have "
            "what PEFT's files say, and neither the method nor what training remembers, remove "
            f"{OWN} and {OWN_TENSORS}"
        )
    is_sound = said.sha256 is None or said.sha256 == checksum(content)
    if not others:
        own = _own(path, said, found.get(OWN_TENSORS), peft)
        return Beside(own, said.base, None, is_sound, said.config)
    if not is_sound:
        raise unsound(path)
    warnings.warn(
        f"{path}: {others[0]} is not the one that {OWN} was written with. So {OWN} is ignored, "
        "but for the base that it names, and the adapter is what PEFT's files say",
        LorakinWarning,
        stacklevel=4,
    )
    return Beside(None, said.base, others[0])


def unsound(path: Path) -> AdapterError:
    """The error for a `lorakin.json` that is not as it was written."""
    return AdapterError(
        f"{path / OWN}: it is damaged, or was edited: its {CHECKSUM} belongs to something else. To "
        "have what PEFT's files say alone, remove it"
    )


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `adapter_config.json` that say which adapter it is."""
    return {key: value for key, value in config.items() if key not in ASIDE}


def disagreement(
    path: Path, then: Mapping[str, Any], config: Mapping[str, Any]
) -> AdapterError | None:
    """The error for a `config`, in `adapter_config.json`, that is not what was saved in `path`.

    Fields that PEFT adds when it writes the file again do not count, nor a field that is empty in
    both.
    """
    for key, value in then.items():
        if (config.get(key) or None) != (value or None):
            now = shown(config.get(key)) if key in config else "missing"
            return AdapterError(
                f"{path / CONFIG}: {key} is {now}, and {OWN} says that {shown(value)} was saved: "
                f"one of the two is damaged, or was edited. Put {shown(value)} back; or, to have "
                f"what {CONFIG} says, without the method, remove {OWN}"
            )
    return None


def checksum(own: Mapping[str, Any]) -> str:
    """SHA-256 of what `lorakin.json` says, without this checksum, however it is laid out."""
    rest = {key: value for key, value in own.items() if key != CHECKSUM}
    return sha256(json.dumps(rest, sort_keys=True).encode())


def tensors_in(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, sorted by name, since `load` has a new order each time."""
    return dict(sorted(safetensors.torch.load(content).items()))


def _own(path: Path, said: Said, content: bytes | None, peft: Mapping[str, Tensor]) -> Own:
    """What `lorakin.json` says, with its tensors; `content` is `lorakin.safetensors`."""
    try:
        more = tensors_in(content) if content is not None else {}
        found = {
            name: unpacked(getattr(said, name), more, peft)
            for name in ("tensors", "state", "buffers")
        }
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: {OWN} or {OWN_TENSORS} is damaged ({error})") from None
    for key, tensor in more.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise AdapterError(f"{path}: tensor {key} of {OWN_TENSORS} holds NaN or infinity")
    return Own(
        said.members,
        found["tensors"],
        said.patterns or ({}, {}),
        found["state"],
        said.projection,
        said.base,
        found["buffers"] or {},
        said.whole,
    )
