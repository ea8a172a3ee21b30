"""Which transformers class an adapter's base is loaded as, and a classifier's labels."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn

from lorakin.errors import AdapterError
from lorakin.storage.directory import AdapterFiles
from lorakin.training import loading

TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's words for tasks → what transformers loads for them."""
PREFIX = "base_model.model."
"""How the names in an adapter's file begin."""


def is_seq2seq(config: Any) -> bool:
    """Returns whether a config is of a model with an encoder and a decoder, as T5 and BART.

    >>> is_seq2seq(transformers.T5Config()), is_seq2seq(transformers.LlamaConfig())
    (True, False)
    """
    known = type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    return known and bool(getattr(config, "is_encoder_decoder", False))


@dataclasses.dataclass(frozen=True)
class BaseClass:
    """A class of transformers, or one of its Auto classes, and a classifier's labels in order."""

    cls: Any
    labels: Sequence[str] | None = None

    def settings(self) -> dict[str, Any]:
        """Returns the settings of the model's config that hold its labels."""
        if self.labels is None:
            return {}
        by_number = dict(enumerate(self.labels))
        return {
            "num_labels": len(by_number),
            "id2label": by_number,
            "label2id": {label: number for number, label in by_number.items()},
        }

    def skeleton(self, config: Any) -> Any:
        """Returns a model of this kind on the meta device, with a copy of `config`.

        Raises:
            ModelError: the config is of no such model.
        """
        config = copy.deepcopy(config)
        if self.labels is not None:
            config.id2label = self.settings()["id2label"]
            config.label2id = self.settings()["label2id"]
        what = f"{type(config).__name__} is the config of no model for {self.cls.__name__}"
        with loading.as_model_error(what), torch.device("meta"), warnings.catch_warnings():
            # Initialisers warn that they find nothing to initialise.
            warnings.simplefilter("ignore", UserWarning)
            model = loading.model_from_config(self.cls, config)
        _forget_values(model)
        return model


def _forget_values(model: nn.Module) -> None:
    """Moves to the meta device the parameters that a model makes elsewhere all the same."""
    on_meta: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                moved = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                module._parameters[name] = on_meta.setdefault(id(parameter), moved)


def kind_for(files: AdapterFiles, config: Any, labels: Sequence[str] | None = None) -> BaseClass:
    """Returns what the base of an adapter is.

    That is the class on which the adapter was made, as its files remember it; else the one for its
    task; else the one that the base's config names; else a causal language model. If the adapter
    holds a head with another number of classes than the base's, there are as many classes.

    Args:
        files: the adapter's.
        config: the base's.
        labels: the classes, if they are known.

    Raises:
        AdapterError: the adapter's head fits no number of classes.
    """
    candidates = [_recorded_class(files), *_auto_mapping_class(files)]
    task = TASKS.get(str(files.config.get("task_type")))
    named = (found for word in candidates if (found := class_named(word, config)) is not None)
    cls = next(named, None)
    if cls is None and task is not None:
        cls = getattr(transformers, task)
    if cls is None:
        cls = own_class(config) or transformers.AutoModelForCausalLM
    return BaseClass(cls, _labels(cls, files, config) if labels is None else labels)


def own_class(config: Any) -> Any:
    """Returns the class that a config names; None if transformers has no such class."""
    candidates = getattr(config, "architectures", None) or ()
    return next(
        (found for word in candidates if (found := class_named(word, config)) is not None), None
    )


def class_named(word: Any, config: Any) -> Any:
    """Returns transformers' class of this name if it takes such a config, else None."""
    cls = getattr(transformers, word, None) if isinstance(word, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        return None
    takes: Any = getattr(cls, "config_class", None)
    return cls if takes is not None and isinstance(config, takes) else None


def _recorded_class(files: AdapterFiles) -> Any:
    base = files.base
    return None if base is None else base.get("class")


def _auto_mapping_class(files: AdapterFiles) -> list[Any]:
    """Returns the class in the `auto_mapping` that PEFT writes if it knows no task."""
    mapping = files.config.get("auto_mapping")
    return [mapping.get("base_model_class")] if isinstance(mapping, dict) else []


def _labels(cls: Any, files: AdapterFiles, config: Any) -> list[str] | None:
    """Returns as many classes as the adapter's head has, if the config gives another number."""
    if not files.config.get("modules_to_save"):
        return None
    expected = {
        PREFIX + name: p.shape for name, p in BaseClass(cls).skeleton(config).named_parameters()
    }
    for key, tensor in files.tensors.items():
        shape = expected.get(key)
        if shape is None or shape == tensor.shape:
            continue
        if shape[1:] != tensor.shape[1:] or shape[0] != getattr(config, "num_labels", None):
            raise AdapterError(
                f"{files.path}: {key.removeprefix(PREFIX)} is {tuple(tensor.shape)}, which no "
                f"number of classes makes of this base's {tuple(shape)}"
            )
        return [str(number) for number in range(tensor.shape[0])]
    return None
