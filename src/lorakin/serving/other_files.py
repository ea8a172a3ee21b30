"""The files of a model's directory that hold no weights: they are copied to a merged model."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorakin.errors import ModelError
from lorakin.training import model_files

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".index.json",
)
"""The endings of files with weights; all other files are copied unchanged."""


def copy_other_files(base: Path, out: Path) -> None:
    """Copies the files of `base` without weights into `out`, unless `out` has them already."""
    for file, relative in files_without_weights(base):
        if not (out / relative).exists():
            (out / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / relative)


def files_without_weights(base: Path) -> list[tuple[Path, Path]]:
    """Returns the files in a model's directory to copy, each with its path inside.

    Links are followed inside the directory, and from a snapshot of the hub's cache into its blobs,
    where all of its files are. An adapter's config is not copied: transformers would apply that
    adapter once more to the merged model.

    Raises:
        ModelError: a link leads elsewhere, to content that does not belong to the model.
    """
    home = base.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    files = []
    for file in sorted(base.rglob("*")):
        relative = file.relative_to(base)
        hidden = any(part.startswith(".") for part in relative.parts)
        unwanted = file.name.endswith(WEIGHTS) or file.name == model_files.ADAPTER
        if hidden or unwanted or not file.is_file():
            continue
        resolved = file.resolve()
        if not any(resolved.is_relative_to(home) for home in homes):
            raise ModelError(
                f"{file} is a link to {resolved}, outside of the model's directory, so it is not "
                "copied into the result; put the file itself there, or remove the link"
            )
        files.append((file, relative))
    return files
