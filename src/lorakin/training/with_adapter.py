"""A base model with a saved adapter, loaded as the class the adapter was trained on."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakin.errors import AdapterError, LorakinWarning, some
from lorakin.loading import insert_document
from lorakin.storage import directory, hub, tokenizer_fingerprint
from lorakin.storage.fingerprint import LABELS
from lorakin.storage.peft.tasks import is_classifiers
from lorakin.training.base_class import BaseClass, kind_for
from lorakin.training.chat_templates import remembered_template, use_remembered
from lorakin.training.models import Loaded, config_of, incomplete, load, load_model, load_tokenizer
from lorakin.training.run_directory import RECIPE
from lorakin.training.yaml_values import read_yaml


def load_with_adapter(
    name: str,
    adapter: str | directory.AdapterFiles | None,
    dtype: str = "auto",
    labels: Sequence[str] | None = None,
    other_base: bool = False,
    quantize: str | None = None,
    any_head: bool = False,
) -> Loaded:
    """Loads a base model with an adapter, or without one.

    The model is a classifier if the adapter was trained on one, with as many classes as the
    adapter's head, or with `labels`; else a causal language model.

    Args:
        name: the base, as for `load_model`.
        adapter: a directory, a hub id, files that were read, or None.
        dtype: as for `load_model`.
        labels: the classes of a classifier, in order.
        other_base: whether a base with other weights than the adapter's own is accepted.
        quantize: as for `load_model`.
        any_head: whether the model is whatever the adapter was made on (see `kind_for`).

    Raises:
        ModelError, AdapterError: one of them cannot be loaded, or they do not fit together.
    """
    if adapter is None:
        return load_model(name, dtype, labels, quantize)
    # Read once, so that all of it is of one save.
    files = directory.read(hub.adapter_directory(adapter)) if isinstance(adapter, str) else adapter
    any_head = any_head or files.config.get("task_type") in ("SEQ_2_SEQ_LM", "TOKEN_CLS")
    if any_head:
        kind = kind_for(files, config_of(name), labels or recipe_labels(files))
    else:
        kind = BaseClass(None, labels_of(files) if labels is None else labels)
    loaded = load(name, dtype, kind.labels, quantize, kind.cls)
    if any_head:
        _check_complete(loaded, files)
    _insert(loaded, files, "default", other_base)
    return loaded


def add_adapter(loaded: Loaded, adapter: str, name: str, other_base: bool = False) -> Loaded:
    """Puts another adapter into a model that has some; returns the model with its tokenizer.

    Args:
        loaded: from `load_with_adapter`.
        adapter: a directory or a hub id.
        name: the adapter's name in the model.
        other_base: as for `load_with_adapter`.

    Raises:
        AdapterError: it cannot be read, or does not fit the model.
    """
    files = directory.read(hub.adapter_directory(adapter))
    tokenizer = load_tokenizer(loaded.name)  # the model's may have another adapter's template
    added = dataclasses.replace(loaded, tokenizer=tokenizer)
    tokenizer_fingerprint.remember(added.model, tokenizer)
    _insert(added, files, name, other_base)
    return added


def _insert(loaded: Loaded, files: directory.AdapterFiles, name: str, other_base: bool) -> None:
    _warn_of_other_base(loaded, files)
    if loaded.tokenizer is not None and remembered_template(files.path) is not None:
        # The adapter answers with this template.
        use_remembered(loaded.tokenizer, files.path)
        tokenizer_fingerprint.remember(loaded.model, loaded.tokenizer)
    insert_document(loaded.model, name, files.match(loaded.model, other_base))


def check_fits(loaded: Loaded, files: directory.AdapterFiles) -> None:
    """Checks what an adapter's files say of their base, before they are matched with it.

    Raises:
        ModelError: the base lacks weights which the adapter does not hold either.
    """
    _check_complete(loaded, files)
    _warn_of_other_base(loaded, files)


def _check_complete(loaded: Loaded, files: directory.AdapterFiles) -> None:
    """Refuses a base that lacks weights which the adapter does not hold either."""
    whole = files.config.get("modules_to_save") or ()
    new = {path for path in loaded.fresh if not any(f".{part}." in f".{path}." for part in whole)}
    keys = [key for key, _ in loaded.model.named_parameters() if key.rpartition(".")[0] in new]
    if keys:
        raise incomplete(loaded.name, keys, loaded.model)


def _warn_of_other_base(loaded: Loaded, files: directory.AdapterFiles) -> None:
    """Warns if an adapter without a fingerprint of its base names another base."""
    named_base = files.config.get("base_model_name_or_path")
    if files.base is not None or not isinstance(named_base, str):
        return
    if Path(named_base).name.lower() != Path(loaded.model.name_or_path).name.lower():
        warnings.warn(
            f"{files.path} says that its base is {named_base}, not {loaded.name}, and holds "
            "nothing to tell whether they are the same",
            LorakinWarning,
            stacklevel=3,
        )


def recipe_labels(files: directory.AdapterFiles) -> list[str] | None:
    """Returns the classes that the recipe beside an adapter names; else those that it remembers.

    Raises:
        AdapterError: the two differ. A class is a place in a list, so in another order all answers
            would be others.
    """
    recorded: list[str] | None = (files.base or {}).get(LABELS)
    recipe = files.path / RECIPE
    settings = read_yaml(recipe) if recipe.is_file() else None
    labels = settings.get("labels") if isinstance(settings, dict) else None
    if not isinstance(labels, list) or not labels:
        return recorded
    in_recipe = [str(label) for label in labels]
    if recorded is not None and in_recipe != recorded:
        raise AdapterError(
            f"{recipe}: labels are {some(in_recipe)}, and the adapter was trained on "
            f"{some(recorded)}; put them back as they were"
        )
    return in_recipe


def recipe_beside(adapter: str | None) -> dict[str, Any]:
    """Returns the settings in the recipe beside an adapter; none if there is none."""
    recipe = Path(adapter or "") / RECIPE
    settings = read_yaml(recipe) if adapter is not None and recipe.is_file() else None
    return settings if isinstance(settings, dict) else {}


def labels_of(files: directory.AdapterFiles) -> list[str] | None:
    """Returns the classes of a classifier's adapter; None if it is not a classifier's.

    They come from the recipe beside it; else there is one for each row of its trained head.

    Raises:
        AdapterError: a classifier's adapter without a trained head.
    """
    if not is_classifiers(files.config, str((files.base or {}).get("class"))):
        return None
    if (labels := recipe_labels(files)) is not None:
        return labels
    whole = files.config.get("modules_to_save") or []
    keys = [key for key in files.tensors if key.endswith(".weight")]
    heads = [files.tensors[key] for key in keys if any(f".{name}." in key for name in whole)]
    if not heads:
        raise AdapterError(
            f"{files.path}: it is a classifier's adapter without a trained head, "
            "so its classes are unknown"
        )
    return [str(number) for number in range(heads[-1].shape[0])]
