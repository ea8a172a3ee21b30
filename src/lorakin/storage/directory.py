"""An adapter's directory: PEFT's two files, and beside them `lorakin.json` with what PEFT's cannot say."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lorakin.errors import AdapterError, LorakinWarning, OutputError
from lorakin.storage import peft_format
from lorakin.surgery.graft import Graft

CONFIG, TENSORS, OLD_TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "lorakin.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Files:
    """What an adapter's directory holds, read but not yet matched with a model."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    own: Mapping[str, Any]

    def match(self, model: nn.Module) -> peft_format.Contents:
        """Match with `model`; see `peft_format.from_files`."""
        return peft_format.from_files(model, self.config, self.tensors, self.own, str(self.path))


def save(graft: Graft, path: Path) -> Path:
    """Write the adapter into the directory `path`, made if need be. Every file is written beside its place and then renamed.

    Raises:
        OutputError: it cannot be written; an adapter that was there is intact.
    """
    member = graft.plan.member
    own = {"format": FORMAT, "member": member.word, "settings": dataclasses.asdict(member)}  # type: ignore[call-overload]
    tensors = safetensors.torch.save(peft_format.to_tensors(graft), metadata={"format": "pt"})
    write(path, {TENSORS: tensors, CONFIG: _json(peft_format.to_config(graft)), OWN: _json(own)})
    return path


def read(path: Path) -> Files:
    """Read an adapter's directory, ours or PEFT's.

    Raises:
        AdapterError: no directory, no config, no tensors, or files that cannot be parsed.
    """
    if not path.is_dir():
        raise AdapterError(f"there is no adapter directory {path}")
    config = _read_json(path / CONFIG)
    own = _read_json(path / OWN) if (path / OWN).exists() else {}
    if own and own.get("format") != FORMAT:
        raise AdapterError(f"{path / OWN}: format {own.get('format')!r}, this version reads {FORMAT}; update lorakin")
    try:
        if (path / TENSORS).exists():
            tensors = safetensors.torch.load_file(path / TENSORS)
        elif (path / OLD_TENSORS).exists():
            tensors = torch.load(path / OLD_TENSORS, map_location="cpu", weights_only=True)
        else:
            raise AdapterError(f"{path} has no {TENSORS}")
    except pickle.UnpicklingError:
        raise AdapterError(f"{path / OLD_TENSORS} cannot be read: it holds more than tensors, and is not run") from None
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(f"{path}: its tensors cannot be read ({error})") from None
    return Files(path, config, tensors, own)


def write(path: Path, files: Mapping[str, bytes]) -> None:
    """Put `files` (name → content) into the directory `path`: all are written under other names first, then renamed.

    Raises:
        OutputError: nothing was changed in `path`, whose files are as they were.
    """
    temporary = {name: path / f".{name}.{uuid.uuid4().hex[:8]}.tmp" for name in files}
    try:
        path.mkdir(parents=True, exist_ok=True)
        if taken := [name for name in files if (path / name).is_dir()]:
            raise IsADirectoryError(errno.EISDIR, f"{taken[0]} is a directory")
        for name, content in files.items():
            with open(temporary[name], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        try:
            _rename(path, temporary)
        except KeyboardInterrupt:
            _rename(path, temporary)
            raise
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror or error}; what was there is unchanged") from error
    finally:
        for leftover in temporary.values():
            with contextlib.suppress(OSError):
                leftover.unlink()


def _rename(path: Path, temporary: Mapping[str, Path]) -> None:
    for name, source in temporary.items():
        if source.exists():
            os.replace(source, path / name)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} has no {path.name}; is it an adapter's directory?") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def warn_of_zero_changes(graft: Graft) -> None:
    """Say so if the adapter, or part of it, is still exactly the base: training never reached it."""
    still = [path for path in graft.plan.sites if _changes_nothing(graft, path)]
    if still:
        share = "every module" if len(still) == len(graft.plan.sites) else f"{len(still)} of {len(graft.plan.sites)} modules"
        warnings.warn(
            f"adapter {graft.name!r} changes nothing in {share} ({still[0]}, …): the change is exactly zero there, so "
            "training never reached it",
            LorakinWarning,
            stacklevel=3,
        )


def _changes_nothing(graft: Graft, path: str) -> bool:
    pair = graft.site(path).pair()
    return not pair.up.is_meta and pair.gain is None and not (bool(pair.up.any()) and bool(pair.down.any()))
