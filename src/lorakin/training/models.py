"""Loading base models: a hub id, a directory, a `.gguf` file, or packaged `smollm2` or `minilm`."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lorakin.errors import LorakinWarning, ModelError
from lorakin.inject.heads import head_of
from lorakin.storage import paths, tokenizer_fingerprint
from lorakin.training import gguf_cache, heads, loading, model_files
from lorakin.training.base_class import is_seq2seq
from lorakin.training.model_sources import PACKAGED, located, source_of
from lorakin.training.precision import DTYPES, best_device, quantisation, resolve_dtype
from lorakin.waiting import waiting

REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Lets transformers tell what is wrong with a model's weights, instead of stopping there."""


@dataclasses.dataclass
class Loaded:
    """A base model with its tokenizer.

    Attributes:
        model: the model, on its device.
        tokenizer: its tokenizer, or None.
        name: what the user called it.
        dtype: the dtype of its weights, such as "float32".
        fresh: paths of modules that its files lack, so that their weights are random.
        note: what became of a stored head, for the user; None if it is as it was stored.
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
    auto: str | None = None,
) -> Loaded:
    """Loads a causal language model, a classifier, or a model of another class.

    Args:
        name: a packaged model ("smollm2", "minilm"), a `.gguf` file, a directory, or a hub id.
        dtype: "float32", "bfloat16", "float16", "base" (as the weights are stored), or "auto" (see
            `precision.fastest_dtype`).
        labels: the classes of a classifier, in order; its head is new unless it is stored for them.
        quantize: one of `precision.QUANTISATIONS`: keeps the linear layers, except the head, in so
            few bits. Without it, a model that is stored quantised stays so.
        cls: another class of transformers, or one of its Auto classes. What the files lack of it
            is random and `fresh`, and there may be no tokenizer.
        auto: the name of the Auto class of the task; by default that of a model that writes, or of
            a classifier of texts.

    Raises:
        ModelError: nothing of that name can be found or loaded.
        SettingError: an unknown dtype or quantisation, or one whose package is missing.
    """
    loaded = load(name, dtype, labels, quantize, cls, auto)
    if loaded.note is not None:
        warnings.warn(f"model {name!r}: {loaded.note}", LorakinWarning, stacklevel=2)
    return loaded


def load(
    name: str,
    dtype: str,
    labels: Sequence[str] | None,
    quantize: str | None,
    cls: Any,
    auto: str | None = None,
) -> Loaded:
    """Loads a model as `load_model` does, without the warning that says what is in `note`."""
    with waiting(f"loading {name}"):
        return _load(name, dtype, labels, quantize, cls, auto)


def _load(
    name: str,
    dtype: str,
    labels: Sequence[str] | None,
    quantize: str | None,
    cls: Any,
    auto: str | None,
) -> Loaded:
    chosen = resolve_dtype(dtype, classification=labels is not None)
    source, task = source_of(name), task_settings(labels)
    options: dict[str, Any] = {**REPORT, "dtype": DTYPES.get(chosen, "auto")}
    quantisation_config = None if quantize is None else quantisation(quantize)
    size = _size(source)
    with loading.as_model_error(f"model {name!r} cannot be loaded"):
        stored_config = loading.config(source)
        loads = cls or getattr(transformers, auto or _auto_class(labels, stored_config))
        if quantisation_config is not None:
            config = quantisation_config(
                DTYPES.get(chosen, torch.bfloat16), _new_modules(loads, source, task)
            )
            options |= {"quantization_config": config, "device_map": {"": best_device()}}
        with loading.limited_size(*size):
            model, loading_info = loading.model(loads, source, **options, **task)
        tokenizer = _tokenizer(source) if cls is None else _tokenizer_if_any(source)
        if tokenizer is not None:
            tokenizer_fingerprint.remember(model, tokenizer)

    is_language_model = labels is None and cls is None
    is_causal = loads is transformers.AutoModelForCausalLM
    if is_causal and getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"model {name!r} says is_encoder_decoder, and a {type(model).__name__} has no encoder "
            "beside it; if the config is wrong, leave the key out"
        )
    mismatched = _check(name, model, loading_info, stored_config, labels)
    missing = sorted(set(loading_info["missing_keys"]) & dict(model.named_parameters()).keys())
    if is_language_model and missing:
        raise incomplete(name, missing, model)
    note = None
    if labels is not None:
        stored = heads.named_classes(stored_config, loads.__name__.removeprefix("AutoModel"))
        note = heads.fit(model, stored, labels, mismatched)
    if labels is not None and tokenizer is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    where = str(Path(name).resolve()) if Path(name).exists() else name
    model.name_or_path = model.config.name_or_path = where
    # A quantiser has put the model on its device.
    if getattr(model, "hf_quantizer", None) is None:
        model.to(best_device())
    fresh = tuple(dict.fromkeys(key.rpartition(".")[0] for key in (*missing, *mismatched)))
    return Loaded(model, tokenizer, name, str(model.dtype).removeprefix("torch."), fresh, note)


def _auto_class(labels: Sequence[str] | None, config: Any) -> str:
    if labels is not None:
        return "AutoModelForSequenceClassification"
    return "AutoModelForSeq2SeqLM" if is_seq2seq(config) else "AutoModelForCausalLM"


def _check(
    name: str,
    model: Any,
    loading_info: dict[str, Any],
    stored_config: Any,
    labels: Sequence[str] | None,
) -> list[str]:
    """Checks the files' weights against the model's; returns parameters stored in other shapes.

    Raises:
        ModelError: weights in the files that the model has no use for, or of a wrong shape.
    """
    is_packed = getattr(stored_config, "quantization_config", None) is not None
    heads.check_unused(
        name, model, loading_info["unexpected_keys"], stored_config.architectures or (), is_packed
    )
    replaceable = () if labels is None else head_of(model)
    return heads.check_shapes(name, model, loading_info["mismatched_keys"], replaceable)


def incomplete(name: str, missing: Sequence[str], model: Any) -> ModelError:
    """Returns the error for a model whose files lack these weights."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return ModelError(
        f"model {name!r} lacks {missing[0]}{more} of a {type(model).__name__}, which would be "
        "random. Its files hold a model without that part, as an encoder's do, which writes no "
        "text: give rows with labels, or another model"
    )


def _size(source: str) -> tuple[int, int, str]:
    """Returns how many tensors and numbers a model may have, once its files were checked."""
    folder = Path(source)
    if folder.is_dir():
        stored = model_files.check(folder)
        _warn_of_adapter(source, (folder / model_files.ADAPTER).is_file())
        what = f"{source}, with {stored.tensors:,} tensors in {stored.bytes:,} bytes,"
        return stored.most_tensors, stored.most_numbers, what
    with loading.as_model_error(f"model {source!r} cannot be loaded"):
        model_files.check_values(loading.raw_config(source), f"the config of {source}")
        _warn_of_adapter(source, loading.hub_has_file(source, model_files.ADAPTER))
    return loading.TENSORS, loading.NUMBERS, source


def _warn_of_adapter(source: str, is_there: bool) -> None:
    if is_there:
        warnings.warn(
            f"an adapter lies beside the model in {source} ({model_files.ADAPTER}). It is not "
            f"applied: this is the base alone. To use it, say --adapter {source}",
            LorakinWarning,
            stacklevel=5,
        )


def _new_modules(auto: Any, source: str, task: dict[str, Any]) -> list[str] | None:
    """Returns the modules that a classifier's files lack: they are trained, so not quantised."""
    if not task:
        return None
    model, loading_info = loading.model(auto, source, device_map="meta", **REPORT, **task)
    parameters = dict(model.named_parameters())
    missing = {key.rpartition(".")[0] for key in loading_info["missing_keys"] if key in parameters}
    return sorted(missing | set(head_of(model)))


def load_tokenizer(name: str) -> Any:
    """Returns the tokenizer of a model; of a hub id only the tokenizer's files are fetched.

    Raises:
        ModelError: there is none.
    """
    source = source_of(name)
    if Path(source).is_dir():
        model_files.check_config(Path(source))
    with loading.as_model_error(f"model {name!r} has no tokenizer that can be read"):
        return _tokenizer(source)


def _tokenizer(source: str) -> Any:
    tokenizer = loading.tokenizer(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _tokenizer_if_any(source: str) -> Any:
    try:
        return _tokenizer(source)
    except (OSError, ValueError, KeyError, TypeError):  # a slow one without its file: TypeError
        return None


def config_of(name: str, labels: Sequence[str] | None = None) -> Any:
    """Returns the config of a model; of a hub id only its config.json is fetched.

    Args:
        name: as for `load_model`.
        labels: the classes of a classifier, in order.

    Raises:
        ModelError: nothing of that name can be found.
    """
    place = located(name)
    if isinstance(place, Path) and place.suffix == ".gguf":
        return gguf_cache.config(place, **task_settings(labels))
    if isinstance(place, Path):
        model_files.check_config(place)
    with loading.as_model_error(_no_config(name, place)):
        if not isinstance(place, Path):
            model_files.check_values(loading.raw_config(place), f"the config of {name}")
        return loading.config(place, **task_settings(labels))


def _no_config(name: str, place: Path | str) -> str:
    """Returns how the error begins that says why a model's config cannot be read."""
    if isinstance(place, Path):
        return f"model {name!r} has no config that can be read"
    close = difflib.get_close_matches(name, PACKAGED, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return (
        f"model {name!r} is not one of {', '.join(PACKAGED)} and no directory here, and as a hub "
        f"id it has no config that can be read{meant}"
    )


def task_settings(labels: Sequence[str] | None) -> dict[str, Any]:
    """Returns what a classifier's config says of its classes; nothing for a language model.

    >>> task_settings(["no", "yes"])["label2id"]
    {'no': 0, 'yes': 1}
    """
    if labels is None:
        return {}
    named = dict(enumerate(labels))
    return {
        "num_labels": len(named),
        "id2label": named,
        "label2id": {label: number for number, label in named.items()},
    }


def stored_labels(name: str) -> list[str] | None:
    """Returns the classes of a model that is stored as a classifier; None for any other."""
    if name in PACKAGED:
        return None
    folder = paths.user_path(name, "--model", ModelError)
    return heads.named_classes(config_of(name)) if (folder / model_files.CONFIG).is_file() else None
