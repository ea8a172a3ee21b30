"""An adapter's directory: PEFT's two files, beside them lorakin's with what PEFT's cannot say, and a model card.

`lorakin.json` names the members with their settings; `lorakin.safetensors` holds tensors that PEFT has no form for, and
what training remembers between steps.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lorakin.errors import AdapterError, LorakinWarning, StateError, some
from lorakin.family import all_finite
from lorakin.family.pair import is_sharded
from lorakin.storage import atomic, card, peft_format
from lorakin.storage.fields import misfit
from lorakin.storage.files import content as file_content
from lorakin.storage.files import regular
from lorakin.storage.fingerprint import difference, fingerprint, is_fingerprint
from lorakin.storage.pickles import tensors_of
from lorakin.storage.schema import Check, shown
from lorakin.surgery.adapted import module_at
from lorakin.surgery.biases import bias_of
from lorakin.surgery.graft import Graft
from lorakin.surgery.tokens import base_rows, ids_at

CONFIG, TENSORS, OLD_TENSORS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
OWN, OWN_TENSORS = "lorakin.json", "lorakin.safetensors"
FORMAT = 1
MOST_JSON = 1 << 26
"""Bytes of one of the JSON files: of the largest mixtures some ten million."""


@dataclasses.dataclass(frozen=True)
class _Member:
    member: str
    settings: dict[str, Any]


def _is_state(value: Mapping[str, Any]) -> bool:
    return type(value.get("steps")) is int and isinstance(value.get("rules"), list)


_Named = Annotated[dict[Literal["tensor"], str], Check("a tensor's name", lambda value: len(value) == 1)]
KINDS: Mapping[str, Any] = {
    "members": list[_Member],
    "beside": dict[Literal["adapter_model.safetensors", "lorakin.safetensors"], str],
    "patterns": tuple[dict[str, Any], dict[str, Any]],
    "tensors": dict[str, dict[str, _Named]],
    "state": Annotated[dict[str, Any], Check("steps, a number, and rules, a list", _is_state)],
    "base": dict[str, Any],
    "buffers": dict[str, _Named],
    "whole": list[str],
    "projection": str,
}
"""Field of lorakin.json -> what it must hold if it is there."""


@dataclasses.dataclass(frozen=True)
class Files:
    """What an adapter's directory holds, read but not yet matched with a model."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    own: peft_format.Own | None

    def match(self, model: nn.Module, other_base: bool = False) -> peft_format.Contents:
        """Match with `model`; see `peft_format.from_files`.

        Raises:
            AdapterError: also if the adapter remembers another base, unless `other_base`.
        """
        contents = peft_format.from_files(model, self.config, self.tensors, self.own, str(self.path))
        remembered = None if other_base or self.own is None else self.own.base
        if remembered and (apart := difference(remembered, fingerprint(model, ids_at(contents.plan.tokens)))):
            random = "Rows that a resize added are random where the adapter does not train them. " if contents.rows else ""
            raise AdapterError(
                f"{self.path}: it is for another base model: {apart}. {random}Load that base, or, if this one is meant, "
                "say so with other_base=True or --other-base"
            )
        return contents


def save(graft: Graft, path: Path, notes: Mapping[str, object] | None = None, home: str | None = None) -> Path:
    """Write the adapter into the directory `path`, made if need be, all of its files or none.

    Among them is a model card, README.md, unless a person's is there. `notes` and `home` are for it: see `card.content`.

    Raises:
        OutputError: it cannot be written; an adapter that was there is intact.
    """
    graft.check_sizes()
    form = peft_format.native_form(graft)
    config, tensors = peft_format.to_files(graft, form)
    files = {TENSORS: safetensors.torch.save(tensors, metadata={"format": "pt"}), CONFIG: _json(config)}
    method = graft.plan.method
    more: dict[str, Tensor] = {}
    own: dict[str, Any] = {
        "format": FORMAT,
        "members": [{"member": m.word, "settings": dataclasses.asdict(m)} for m in method.members],  # type: ignore[call-overload]
        "beside": {TENSORS: _sha256(files[TENSORS])},
    }
    if form is None:
        sites = {at: graft.tensors_at(at) for at in graft.plan.sites}
        own["patterns"] = [dict(graft.plan.rank_pattern), dict(graft.plan.alpha_pattern)]
        own["tensors"] = _packed(sites, "tensors", more, {})
    elif shared := peft_format.shared_tensors(graft, form):
        own["projection"] = peft_format.projection_checksum(shared)
    own["base"] = fingerprint(graft.model, ids_at(graft.plan.tokens))
    if moved := graft.moved_buffers():
        own["buffers"] = _packed(moved, "buffers", more, {})
    if graft.plan.copies:
        own["whole"] = list(graft.plan.copies)
    if graft.rules is not None:
        own["state"] = _packed(graft.state(), "state", more, {})
    if more:
        files[OWN_TENSORS] = safetensors.torch.save(more, metadata={"format": "pt"})
        own["beside"][OWN_TENSORS] = _sha256(files[OWN_TENSORS])
    files[OWN] = _json(own)
    text = card.content(graft, config, notes or {}, home, converted=form is None)
    if (readme := card.for_saving(path / card.CARD, text)) is not None:
        files[card.CARD] = readme
    atomic.write(path, files)
    if not more:
        (path / OWN_TENSORS).unlink(missing_ok=True)  # of an adapter that was there before
    return path


def _packed(value: Any, key: str, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    """`value` as JSON, its tensors put into `tensors` and named in their stead; one object twice is written once."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = key
            tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": seen[id(value)]}
    if isinstance(value, Mapping):
        return {str(k): _packed(v, f"{key}/{k}", tensors, seen) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(v, f"{key}/{n}", tensors, seen) for n, v in enumerate(value)]
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor], path: Path) -> Any:
    if isinstance(value, dict) and value.keys() == {"tensor"}:
        if value["tensor"] not in tensors:
            raise AdapterError(f"{path}: {OWN_TENSORS} lacks {value['tensor']}")
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: _unpacked(item, tensors, path) for key, item in value.items()}
    return [_unpacked(item, tensors, path) for item in value] if isinstance(value, list) else value


def read(path: Path) -> Files:
    """Read an adapter's directory, ours or PEFT's.

    Raises:
        AdapterError: no directory, no config, no tensors, or files that cannot be parsed.
    """
    if not path.is_dir():
        raise AdapterError(f"there is no adapter directory {path}")
    try:
        atomic.finish(path)
    except OSError as error:
        raise AdapterError(f"{path}: a save that was cut off cannot be finished ({error})") from None
    config = read_json(path / CONFIG)
    tensors = _read_tensors(path)
    return Files(path, config, tensors, _read_own(path))


def _read_own(path: Path) -> peft_format.Own | None:
    """lorakin's own part, or None where there is none, or where PEFT's part was written anew without it."""
    if not (path / OWN).exists():
        return None
    own = read_json(path / OWN)
    if own.get("format") != FORMAT:
        raise AdapterError(f"{path / OWN}: format {shown(own.get('format'))}, this version reads {FORMAT}; update lorakin")
    if reason := misfit(own, KINDS):
        raise AdapterError(f"{path / OWN}: {reason}")
    for name, digest in (own.get("beside") or {}).items():
        if not (path / name).is_file() or _sha256((path / name).read_bytes()) != digest:
            warnings.warn(
                f"{path}: {name} is not the one that {OWN} was written with, so what {OWN} says is left aside and the adapter "
                "is what PEFT's files say",
                LorakinWarning,
                stacklevel=4,
            )
            return None
    try:
        more = safetensors.torch.load_file(path / OWN_TENSORS) if (path / OWN_TENSORS).exists() else {}
        members = tuple((str(entry["member"]), dict(entry["settings"])) for entry in own["members"])
        tensors = _unpacked(own["tensors"], more, path) if "tensors" in own else None
        state = _unpacked(own["state"], more, path) if "state" in own else None
        buffers = _unpacked(own.get("buffers", {}), more, path)
        whole = own.get("whole")
        base, patterns = own.get("base"), own.get("patterns", [{}, {}])
        if base is not None and not is_fingerprint(base):
            raise AdapterError(f"{path / OWN}: what it says of the base is no fingerprint: {str(base)[:80]}")
        if spoilt := [key for key, t in more.items() if t.is_floating_point() and not all_finite(t)]:
            raise AdapterError(f"{path}: tensor {spoilt[0]} of {OWN_TENSORS} holds NaN or infinity")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: {OWN} or {OWN_TENSORS} is damaged ({error})") from None
    return peft_format.Own(members, tensors, patterns, state, own.get("projection"), base, buffers, whole)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if (path / TENSORS).exists():
            return safetensors.torch.load_file(regular(path / TENSORS))
        if (path / OLD_TENSORS).exists():
            return tensors_of(path / OLD_TENSORS)
        raise AdapterError(f"{path} has no {TENSORS}")
    except (SafetensorError, OSError, RuntimeError, ValueError, OverflowError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: its tensors cannot be read ({error})") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        AdapterError: no such file, no JSON, no object, or a key that stands twice.
    """
    try:
        content = json.loads(file_content(path, MOST_JSON), object_pairs_hook=_unique)
    except FileNotFoundError:
        if named := sorted(inner.parent.name for inner in path.parent.glob(f"*/{path.name}")):
            raise AdapterError(
                f"{path.parent} holds adapters in directories of their own ({', '.join(named)}); load one of them"
            ) from None
        raise AdapterError(f"{path.parent} has no {path.name}; is it an adapter's directory?") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which no key stands twice: readers differ in which one they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands in it twice")
    return content


def check_trained(graft: Graft) -> None:
    """See that the adapter is what it says: refuse one whose member never did its work, say what training never reached.

    Raises:
        StateError: a member that acts at optimizer steps never saw one.
    """
    acting = [member.word for member in graft.method.members if member.acts_at_steps]
    if acting and graft.is_fresh and not graft.steps:
        raise StateError(
            f"adapter {graft.name!r} is not saved: {', '.join(acting)} acts at optimizer steps and never saw one, so this is "
            "not what it says. Train with a torch optimizer that holds the adapter's tensors, such as adapter.optimizer(…)"
        )
    unfinished = [reason for rule in graft.rules or () if (reason := rule.check(graft.steps))]
    for reason in (*unfinished, *graft.method.unmoved(graft.places())):
        warnings.warn(f"adapter {graft.name!r}: {reason}", LorakinWarning, stacklevel=3)
    if graft.scale != 1:
        warnings.warn(
            f"files hold no scale: adapter {graft.name!r} is saved as it is at scale 1, and not at {graft.scale:g}; for files "
            "of the scaled change, save what lorakin.as_lora makes of it",
            LorakinWarning,
            stacklevel=3,
        )
    if moved := sorted(graft.moved_buffers()):
        warnings.warn(
            f"training moved buffers of the base ({some(moved)}); they are saved beside adapter {graft.name!r}, in a file that "
            "lorakin reads and PEFT does not. For PEFT, train what owns them whole, with modules_to_save",
            LorakinWarning,
            stacklevel=3,
        )
    whole = [path for path in graft.plan.copies if graft.is_fresh and graft.steps and _is_the_bases(graft, path)]
    if whole:
        warnings.warn(
            f"adapter {graft.name!r} trains {', '.join(whole)} whole, but it is exactly the base's: training never reached it",
            LorakinWarning,
            stacklevel=3,
        )
    for path, rows in base_rows(graft.model, graft.plan.tokens if graft.is_fresh and graft.steps else {}).items():
        same = (graft.rows_at(path).to(rows) == rows).all(1).tolist()
        if still := [str(n) for n, unmoved in zip(graft.plan.tokens[path].ids, same, strict=True) if unmoved]:
            warnings.warn(
                f"adapter {graft.name!r} trains rows of {path} that are exactly the base's: training never met the tokens "
                f"{some(still)}",
                LorakinWarning,
                stacklevel=3,
            )
    own = graft.biases()
    if graft.is_fresh and graft.steps and own and all(_is_the_bases_bias(graft, path, bias) for path, bias in own.items()):
        warnings.warn(
            f"adapter {graft.name!r} trains {some(f'the bias of {path}' for path in own)}, but each is exactly the base's: "
            "training never reached them",
            LorakinWarning,
            stacklevel=3,
        )
    reached = [p for p in graft.places() if not any(rule.gave_up(p) for rule in graft.rules or ())]
    still = [place.path for place in reached if _changes_nothing(graft, place.path)]
    if still:
        share = "every module" if len(still) == len(graft.plan.sites) else f"{len(still)} of {len(graft.plan.sites)} modules"
        warnings.warn(
            f"adapter {graft.name!r} changes nothing in {share} ({still[0]}, …): the change is exactly zero there, so "
            "training never reached it",
            LorakinWarning,
            stacklevel=3,
        )


def _is_the_bases(graft: Graft, path: str) -> bool:
    base = module_at(graft.model, path).state_dict()
    return all(torch.equal(tensor, base[key].to(tensor)) for key, tensor in graft.copy_of(path).state_dict().items())


def _is_the_bases_bias(graft: Graft, path: str, bias: Tensor) -> bool:
    base = bias_of(module_at(graft.model, path))
    if base is None or base.is_meta or is_sharded(base):  # of one that is elsewhere nobody can tell
        return False
    return torch.equal(bias, base.to(bias))


def _changes_nothing(graft: Graft, path: str) -> bool:
    site = graft.site(path)
    if not any(role.trained for role in site.roles().values()):
        return False  # meant to
    bias = graft.biases().get(path)
    if bias is not None and not _is_the_bases_bias(graft, path, bias):
        return False
    pair = site.method.low_rank(site.wide(), site.shape)
    return not pair.up.is_meta and bool(pair.down.numel()) and not (bool(pair.up.any()) and bool(pair.down.any()))
