"""The files of a model's directory that hold no weights: they go along with a merged model."""

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
"""How the names of files with weights end; all other files go along unchanged."""


def copy_beside(base: Path, out: Path) -> None:
    """Copies the files beside the weights of `base` into `out`, unless they are there already."""
    for file, inside in beside(base):
        if not (out / inside).exists():
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / inside)


def beside(base: Path) -> list[tuple[Path, Path]]:
    """Returns the files in a model's directory that go along, each with its path inside.

    Links are followed inside the directory, and from a snapshot of the hub's cache into its blobs,
    where all of its files are. An adapter's config stays behind: transformers would apply that
    adapter once more to the merged model.

    Raises:
        ModelError: a link leads elsewhere, to content that does not belong to the model.
    """
    home = base.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    found = []
    for file in sorted(base.rglob("*")):
        inside = file.relative_to(base)
        hidden = any(part.startswith(".") for part in inside.parts)
        unwanted = file.name.endswith(WEIGHTS) or file.name == model_files.ADAPTER
        if hidden or unwanted or not file.is_file():
            continue
        place = file.resolve()
        if not any(place.is_relative_to(one) for one in homes):
            raise ModelError(
                f"{file} is a link to {place}, outside of the model's directory, so it is not "
                "copied into the result; put the file itself there, or remove the link"
            )
        found.append((file, inside))
    return found
