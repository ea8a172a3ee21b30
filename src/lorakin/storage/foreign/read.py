"""Reads an adapter of another library, whichever it is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lorakin.errors import AdapterError, SettingError, some
from lorakin.inject.targets import named_modules
from lorakin.storage import files
from lorakin.storage.foreign import kohya, loralib, mlx, torchtune
from lorakin.storage.foreign.foreign_file import CONFIG, ForeignAdapter, ForeignFile
from lorakin.storage.json_files import read_json
from lorakin.storage.pickles import tensors_of

USUAL_NAMES = (
    "adapters.safetensors",
    "adapter_model.pt",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
FORMATS: tuple[tuple[str, Callable[[ForeignFile], ForeignAdapter]], ...] = (
    (torchtune.KEY, torchtune.read),
    (mlx.KEY, mlx.read),
    (loralib.KEY, loralib.read),
    (kohya.KEY.pattern, kohya.read),
)
"""Pattern of a key that only this format has → its reader, in the order in which they are tried."""


def read_foreign(path: Path, model: nn.Module, *, alpha: float | None = None) -> ForeignAdapter:
    """Reads the adapter in the file or directory `path` and match it with `model`.

    Args:
        path: the file of tensors, or the directory that holds it.
        model: the base, which is left as it is.
        alpha: for files that do not say it: s = alpha / r. If the file says its scale, the two
            must agree.

    Raises:
        AdapterError: the file cannot be read, is damaged, has an unknown format, does not hold
            low-rank pairs, or belongs to another base; it does not say its scale, and there is no
            `alpha`.
        SettingError: `alpha` is not a positive number.
    """
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if alpha is not None and not (is_number and 0 < alpha < math.inf):
        raise SettingError(f"alpha must be a positive number, not {alpha!r}")
    file = _file_at(path)
    config = read_json(file.parent / CONFIG) if (file.parent / CONFIG).exists() else {}
    source = ForeignFile(str(file), _tensors(file), config, model, named_modules(model), alpha)
    return _reader(source)(source)


def _reader(source: ForeignFile) -> Callable[[ForeignFile], ForeignAdapter]:
    """Returns the reader for the format of the file's keys."""
    keys = list(source.tensors)
    if any(key.startswith("base_model.model.") for key in keys):
        raise source.error(
            "it is in PEFT's layout, which is read from its directory, as lorakin's own is"
        )
    if source.config.get("fine_tune_type") == "full":
        raise source.error(
            "a full fine-tune (fine_tune_type='full'), not an adapter; load it as a model"
        )
    for pattern, reader in FORMATS:
        if any(re.fullmatch(pattern, key) for key in keys):
            return reader
    raise source.error(
        f"tensors of no known adapter format, such as {some(keys) or 'none at all'}; known are the "
        "files of loralib, torchtune, mlx-lm, kohya and LyCORIS, and PEFT's as a directory"
    )


def _file_at(path: Path) -> Path:
    """Returns the file of tensors that `path` is, or that the directory holds."""
    if not path.exists():
        raise AdapterError(f"there is no file or directory {path}")
    if not path.is_dir():
        return path
    found = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *PICKLES))
    usual = [path / name for name in USUAL_NAMES if path / name in found]
    if not usual and len(found) != 1:
        names = some(file.name for file in found) or "no file of tensors"
        raise AdapterError(f"{path} holds {names}; name the adapter's file")
    return (usual or found)[0]


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix not in (".safetensors", *PICKLES):
        raise AdapterError(
            f"{file} is not a file of tensors; expected .safetensors, {', '.join(PICKLES)}"
        )
    if file.suffix != ".safetensors":
        return tensors_of(file)
    try:
        return safetensors.torch.load_file(files.checked_file(file))
    except (SafetensorError, OSError, RuntimeError, ValueError, OverflowError) as error:
        raise AdapterError(f"{file}: its tensors cannot be read ({error})") from None
