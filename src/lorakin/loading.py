"""`load`, which puts an adapter from files into a model."""

from __future__ import annotations

import os

from torch import nn

from lorakin.adapter import Adapter
from lorakin.family import widened
from lorakin.inject.model_registry import root_of
from lorakin.storage import directory, hub
from lorakin.storage.document import Document


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    trainable: bool = False,
    other_base: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Adapter:
    """Puts a saved adapter, lorakin's or PEFT's, into `model`, and activates it.

    PEFT: `PeftModel.from_pretrained`, `load_adapter`.

    >>> import tempfile, torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> adapter = lk.adapt(model, lk.LoRA(rank=1, init="gaussian"))
    >>> _ = torch.nn.init.ones_(model[0].lorakin.default.B)  # as training might have
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = adapter.save(folder)
    ...     adapter.remove()
    ...     lk.load(model, path).method.words
    'lora'

    Args:
        model: the base model that the adapter was trained on.
        path: the adapter's directory, or, if there is none of that name, a hub id, `org/name`.
        name: the adapter's name in this model; files hold none.
        trainable: train it further, which freezes the base. Otherwise no `requires_grad` changes.
        other_base: load it also if it was saved on a base with other weights.
        revision: the hub's branch, tag or commit.
        token: for the hub, instead of the one that `hf auth login` keeps.
        subfolder: where the adapter lies in the directory or the hub's repository.

    Raises:
        AdapterError: tensors are missing, unknown or have other shapes; settings are not
            supported; the base is another one; or the hub has no such adapter. The model is then
            as it was before.
    """
    model = root_of(model)
    folder = hub.adapter_directory(path, revision=revision, token=token, subfolder=subfolder)
    document = directory.read(folder).match(model, other_base)
    return insert_document(model, name, document, trainable)


def insert_document(
    model: nn.Module, name: str, document: Document, trainable: bool = False
) -> Adapter:
    """Puts an adapter that was read from files into `model`, and activates it."""
    adapter = Adapter(model, name, document.placement)
    if not trainable:
        adapter.install(
            document.slots, document.whole_modules, document.buffers, document.rows, document.biases
        )
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
        return adapter

    # Training may change any buffer, so the adapter gets all of the base's, then the file's values.
    adapter.install(
        document.float32_copies(),
        document.whole_modules,
        rows=widened(document.rows),
        biases=document.float32_biases(),
    )
    adapter.tensors.take_buffers(document.buffers)
    adapter.freeze_base()
    return adapter
