"""All calls of transformers' loaders, so that no code shipped with a model runs.

A test finds every other call of such a loader. There is no option to trust a model's own code: it
is trusted nowhere, so a person who reads this file has read all of it. An adapter that lies beside
a model is not applied here; `models.load_model` says that it is there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from transformers.utils import cached_file

from lorakin.errors import LorakinError, ModelError
from lorakin.training.model_files import first_line

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
NO_ADAPTER: dict[str, Any] = {"adapter_kwargs": {"subfolder": ".lorakin-applies-no-adapter"}}
"""transformers looks for an adapter there instead of beside the model."""
TENSORS, NUMBERS = 60_000, 10**14
"""The most parameters, and numbers in them, of a model of which only a config is known."""


def config(source: str | Path, **options: Any) -> Any:
    """Returns the config of a model in a directory, a `.gguf` file (`gguf_file`), or on the hub."""
    return transformers.AutoConfig.from_pretrained(str(source), **{**options, **NO_CODE})


def raw_config(source: str | Path) -> dict[str, Any]:
    """Returns a config as its file has it."""
    content: dict[str, Any] = transformers.PreTrainedConfig.get_config_dict(str(source))[0]
    return content


def model(auto: Any, source: str | Path, **options: Any) -> Any:
    """Returns a model with its weights, of the class or Auto class `auto`."""
    loaded = auto.from_pretrained(str(source), **{**options, **NO_CODE, **NO_ADAPTER})
    # With `output_loading_info=True` it is a pair of the model and what is missing.
    _answer_by_name(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def model_from_config(auto: Any, config: Any, **options: Any) -> Any:
    """Returns a model from a config alone, without stored weights.

    Raises:
        ModelError: the config asks for more parameters than any model has.
    """
    is_auto = not (isinstance(auto, type) and issubclass(auto, nn.Module))
    with limited_size(TENSORS, NUMBERS, "its config"):
        if is_auto:
            model = auto.from_config(config, **{**options, **NO_CODE})
        else:
            model = auto(config, **options)
    _answer_by_name(model)
    return model


def _answer_by_name(model: Any) -> None:
    """Lets a model answer with named outputs, also if its config asks for a tuple."""
    model.config.return_dict = True


def tokenizer(source: str | Path, **options: Any) -> Any:
    """Returns the tokenizer of a model."""
    return transformers.AutoTokenizer.from_pretrained(str(source), **{**options, **NO_CODE})


def snapshot(name: str) -> Path:
    """Fetches a hub id's files, without other frameworks' weights; returns their directory."""
    ignored = ["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.gguf"]
    return Path(huggingface_hub.snapshot_download(name, ignore_patterns=ignored))


def hub_has_file(name: str, file: str) -> bool:
    """Returns whether a hub id has this file, as far as can be known now; the file is fetched."""
    kinds = ("gated_repo", "missing_entries", "connection_errors")
    return (
        cached_file(name, file, **{f"_raise_exceptions_for_{kind}": False for kind in kinds})
        is not None
    )


@contextlib.contextmanager
def as_model_error(what: str) -> Iterator[None]:
    """Turns whatever a library raises about a file from outside into one sentence.

    A damaged file makes libraries raise errors of every class, so all are caught. Our own checks
    run before, and describe the likely faults better.

    Args:
        what: how the sentence begins.

    Raises:
        ModelError: instead of what was raised inside.
    """
    try:
        with quiet_loading():
            yield
    except (LorakinError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        raise ModelError(f"{what}: {first_line(error)}") from error


@contextlib.contextmanager
def limited_size(tensors: int, numbers: int, source: str) -> Iterator[None]:
    """Stops the making of a model that is larger than its source can hold, before it takes memory.

    transformers makes a model on the meta device first, and each module registers what it is given.

    Args:
        tensors: the most parameters and buffers.
        numbers: the most numbers in them.
        source: where the model comes from, for the message.

    Raises:
        ModelError: it has more.
    """
    seen: set[tuple[int, str]] = set()
    total, thread = 0, threading.get_ident()

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal total
        if tensor is None or threading.get_ident() != thread or (id(module), name) in seen:
            return
        seen.add((id(module), name))
        total += tensor.numel()
        if len(seen) > tensors or total > numbers:
            asked = (
                f"{len(seen):,} tensors or more"
                if len(seen) > tensors
                else f"{total:,} numbers or more"
            )
            raise ModelError(
                f"the config asks for a model of {asked}, which {source} cannot hold: one of its "
                "counts is wrong"
            )

    with (
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ):
        yield


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Turns off transformers' progress bars and its note that a new head is new."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    if level <= logging.INFO:  # the user wants to see it (--verbose)
        yield
        return
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
