"""Uploads a directory to the Hugging Face hub: an adapter, a merged model, or GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lorakin.errors import OutputError
from lorakin.serving.output import REPORT
from lorakin.storage import card, directory, hub, paths

GGUF = ".gguf"


class Upload(NamedTuple):
    """What a directory is uploaded as.

    Attributes:
        kind: what it holds, in words.
        files: the files to upload, each with its path in the repository.
        stale: patterns of files in the repository that go if they are not uploaded now.
        tags: lines of the front matter of a card, if the directory has no card.
    """

    kind: str
    files: dict[str, Path]
    stale: tuple[str, ...]
    tags: tuple[str, ...] = ()


def push(
    folder: str,
    name: str,
    *,
    private: bool | None = None,
    message: str | None = None,
    revision: str | None = None,
) -> str:
    """Uploads the directory `folder` into the hub's repository `name`, and returns its address.

    Raises:
        OutputError: the directory holds nothing to upload; no token, no rights, no network.
        AdapterError: the directory holds a damaged adapter.
    """
    path = paths.user_path(folder, "DIR", OutputError)
    if not path.is_dir():
        raise OutputError(f"there is no directory {folder}; name one with an adapter or a model")
    upload = upload_of(path, folder)
    hub.check_login(name)
    if upload.kind == "adapter":
        directory.read(path).check_lorakin_part()

    def link(into: Path) -> None:
        for inside, file in upload.files.items():
            (into / inside).parent.mkdir(parents=True, exist_ok=True)
            (into / inside).symlink_to(file.resolve())
        _write_card(into, upload, name, path)

    return str(
        hub.upload(
            link,
            name,
            private=private,
            commit_message=message or f"Upload {upload.kind} with lorakin",
            revision=revision,
            stale=upload.stale,
        )
    )


def upload_of(path: Path, shown: str) -> Upload:
    """Returns what the directory `path` is uploaded as.

    Hidden files and directories, and the checkpoints of a run, stay here.

    Raises:
        OutputError: it holds no adapter, no model and no GGUF file.
    """
    found = [_adapter, _model, _gguf]
    for kind in found:
        if (upload := kind(path)) is not None:
            return upload
    raise OutputError(
        f"{shown} holds neither an adapter ({directory.CONFIG}), nor a model (config.json with "
        "safetensors), nor GGUF files; name the directory of one"
    )


def _adapter(path: Path) -> Upload | None:
    if not (path / directory.CONFIG).is_file():
        return None
    files = {name: path / name for name in hub.FILES if (path / name).is_file()}
    old = path / directory.OLD_TENSORS
    if directory.TENSORS not in files and old.is_file():
        files[old.name] = old
    return Upload("adapter", files, hub.ADAPTER_TENSORS)


def _model(path: Path) -> Upload | None:
    files = _present(path, lambda file: True)
    weights = [name for name in files if name.endswith(".safetensors")]
    if "config.json" not in files or not weights:
        return None
    stale = ("*.safetensors", "*.safetensors.index.json")
    return Upload("merged model", files, stale, ("library_name: transformers",))


def _gguf(path: Path) -> Upload | None:
    files = _present(
        path, lambda file: file.suffix == GGUF or file.name in ("Modelfile", card.CARD)
    )
    if not any(name.endswith(GGUF) for name in files):
        return None
    return Upload("GGUF files", files, (), ("library_name: gguf",))


def _present(path: Path, wanted: Callable[[Path], bool]) -> dict[str, Path]:
    """Returns the files of a directory that are wanted; the report of an export is not."""
    return {
        file.name: file
        for file in sorted(path.iterdir())
        if file.is_file() and not file.name.startswith(".") and file.name != REPORT and wanted(file)
    }


def _write_card(into: Path, upload: Upload, name: str, path: Path) -> None:
    """Writes the model card: the directory's own, made to name its repository, or a short one."""
    readme = into / card.CARD
    if readme.exists():
        text = readme.read_text(encoding="utf-8", errors="replace")
        if (at_home := card.at_home(text, name)) is not None:
            readme.unlink()
            readme.write_text(at_home, encoding="utf-8")
    elif upload.tags:
        base = _base_of(path)
        heading = f"# {name.rpartition('/')[2]}"
        front = ["---", *upload.tags, *([f'base_model: "{base}"'] if base else [])]
        lines = [*front, "tags:", '- "lora"', '- "lorakin"', "---", "", heading, ""]
        text = f"A {upload.kind} that lorakin wrote.\n"
        readme.write_text("\n".join(lines) + "\n" + text, encoding="utf-8")


def _base_of(path: Path) -> str | None:
    """Returns the hub id of the base that an export's report names, if it names one."""
    try:
        named = json.loads((path / REPORT).read_text(encoding="utf-8"))["order"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return named if isinstance(named, str) and hub.HUB_ID.fullmatch(named) else None
