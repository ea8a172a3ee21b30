"""What an adapter can be exported to: how each target is written, and read back to be compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from lorakin.adapter import Adapter
from lorakin.conversion import insert_pairs
from lorakin.errors import AdapterError, OutputError, some
from lorakin.family import all_finite
from lorakin.inject.description import in_words
from lorakin.loading import load
from lorakin.serving import gguf_adapter, gguf_model, ollama
from lorakin.serving.generation_config import say_where_answers_end
from lorakin.serving.job import ExportJob
from lorakin.serving.merged import Merged, NotStreamed
from lorakin.serving.other_files import copy_beside
from lorakin.switching import adapters
from lorakin.training.base_class import own_class
from lorakin.training.chat_templates import TEMPLATE, remembered_template
from lorakin.training.loading import quiet_loading
from lorakin.training.model_sources import PACKAGED, directory_of, packaged
from lorakin.training.models import Loaded, config_of, load_model, load_tokenizer
from lorakin.training.precision import DTYPES
from lorakin.training.with_adapter import load_with_adapter

GGUF_ADAPTER, GGUF_MODEL, MODELFILE = "adapter.gguf", "model.gguf", "Modelfile"
GGUF_WORDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}


class ExportTarget:
    """One kind of result.

    `dtypes` are those it is written in, the first by default.
    """

    word: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    is_pairs: ClassVar[bool]
    """Whether it holds low-rank pairs beside the base: then ranks matter."""

    @staticmethod
    def write(job: ExportJob, folder: Path) -> None:
        """Writes it into the empty directory `folder`."""
        raise NotImplementedError

    @staticmethod
    def read(job: ExportJob, folder: Path) -> Any:
        """Returns the model that `folder` holds, ready to answer."""
        raise NotImplementedError


class PlainLoRA(ExportTarget):
    """An adapter's directory that every program which reads LoRA knows."""

    word: ClassVar[str] = "lora"
    dtypes = ("float32", "float16", "bfloat16")
    is_pairs = True

    @staticmethod
    def write(job: ExportJob, folder: Path) -> None:
        plain = job.plain()
        if job.order.dtype is not None:
            _narrow(plain, DTYPES[job.order.dtype])
        original = next(iter(adapters(job.base().model).values()))
        worst = max((fit.error for fit in job.fits.values()), default=0.0)
        nearest = {"Nearest pairs": f"largest relative error {worst:.3g}"} if worst else {}
        plain.save(folder, notes={"Made from": in_words(original.method), **nearest})
        _carry_template(job, folder)

    @staticmethod
    def read(job: ExportJob, folder: Path) -> Any:
        model = job.bare().model
        load(model, folder, other_base=job.order.other_base)
        return model


class MergedModel(ExportTarget):
    """A transformers directory that no longer needs lorakin."""

    word = "merged"
    dtypes = ("base", "float32", "float16", "bfloat16")
    is_pairs = False

    @staticmethod
    def write(job: ExportJob, folder: Path) -> None:
        job.forget()
        dtype = DTYPES.get(job.order.dtype or "")
        try:
            _merged(job, dtype).write(folder)
        except NotStreamed:
            loaded = _folded(job, "base" if dtype is None else "float32")
            with quiet_loading():
                loaded.model.to(dtype).save_pretrained(folder)
            copy_beside(directory_of(job.name), folder)
        _carry_template(job, folder)
        say_where_answers_end(folder)

    @staticmethod
    def read(job: ExportJob, folder: Path) -> Any:
        config = config_of(str(folder))
        cls = own_class(config) or transformers.AutoModelForCausalLM
        return load_model(str(folder), "base", cls=cls).model


class GGUFAdapter(ExportTarget):
    """A LoRA for llama.cpp, with a Modelfile for Ollama."""

    word = "gguf"
    dtypes = ("float32", "float16", "bfloat16")
    is_pairs = True

    @staticmethod
    def write(job: ExportJob, folder: Path) -> None:
        loaded, plain = job.base(), job.plain()
        if whole := plain.placement.whole_modules:
            raise AdapterError(
                f"a GGUF adapter cannot hold modules trained whole ({', '.join(whole)}); use --to "
                "gguf-merged"
            )
        if tokens := list(plain.placement.tokens):
            raise AdapterError(
                f"a GGUF adapter cannot hold trained rows of tokens ({', '.join(tokens)}); use "
                "--to gguf-merged"
            )
        if biases := plain.placement.biases:
            raise AdapterError(
                f"a GGUF adapter cannot hold biases ({some(biases)}); use --to gguf-merged"
            )
        pairs = {path: plain.tensors.change_at(path) for path in plain.placement.methods}
        gguf_adapter.write_adapter(
            folder / GGUF_ADAPTER, loaded.model.config, pairs, dtype=_gguf_word(job, "float32")
        )
        base = packaged(job.name) if job.name in PACKAGED else Path(job.name).resolve()
        source = str(base) if base.suffix == ".gguf" else "./base.gguf"
        text = ollama.modelfile(source, f"./{GGUF_ADAPTER}", loaded.tokenizer)
        (folder / MODELFILE).write_text(text, encoding="utf-8")

    @staticmethod
    def read(job: ExportJob, folder: Path) -> Any:
        model = job.bare().model
        insert_pairs(
            model, "written", gguf_adapter.read_adapter(folder / GGUF_ADAPTER, model.config)
        )
        return model


class GGUFModel(ExportTarget):
    """A model for llama.cpp, with a Modelfile for Ollama."""

    word = "gguf-merged"
    dtypes = ("float16", "float32", "bfloat16", "q8_0")
    is_pairs = False

    @staticmethod
    def write(job: ExportJob, folder: Path) -> None:
        job.forget()
        source = directory_of(job.name)
        tensors: Mapping[str, Tensor]
        try:
            tensors = merged = _merged(job, torch.float32)  # the file's dtype is the only rounding
            config = merged.config
        except NotStreamed:
            model = _folded(job, "float32").model
            tensors, config = model.state_dict(), model.config
        word = _gguf_word(job, "float16")
        template, tokenizer = remembered_template(job.files.path), load_tokenizer(str(source))
        tokenizer.chat_template = template or tokenizer.chat_template
        name = Path(job.name).name
        gguf_model.write_model(
            folder / GGUF_MODEL, config, source, tensors, dtype=word, name=name, template=template
        )
        (folder / MODELFILE).write_text(
            ollama.modelfile(f"./{GGUF_MODEL}", None, tokenizer), encoding="utf-8"
        )

    @staticmethod
    def read(job: ExportJob, folder: Path) -> Any:
        return gguf_model.read_model(folder / GGUF_MODEL, directory_of(job.name))


TARGETS: dict[str, type[ExportTarget]] = {
    one.word: one for one in (PlainLoRA, MergedModel, GGUFAdapter, GGUFModel)
}


def _carry_template(job: ExportJob, folder: Path) -> None:
    """Writes the chat template that the adapter was trained with, if it is not the base's own."""
    if (template := remembered_template(job.files.path)) is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def _merged(job: ExportJob, dtype: torch.dtype | None) -> Merged:
    return Merged(directory_of(job.name), job.files, job.kind(), dtype, job.order.other_base)


def _folded(job: ExportJob, dtype: str) -> Loaded:
    """Returns the whole model in memory, with the adapter folded in."""
    loaded = load_with_adapter(
        job.name, job.files, dtype, other_base=job.order.other_base, any_head=True
    )
    for adapter in adapters(loaded.model).values():
        adapter.merge(permanent=True)
    return loaded


def _gguf_word(job: ExportJob, default: str) -> str:
    return GGUF_WORDS[job.order.dtype or default]


def _narrow(adapter: Adapter, dtype: torch.dtype) -> None:
    """Casts all tensors to `dtype`.

    Raises:
        OutputError: a number becomes infinite.
    """
    for name, parameter in adapter.named_parameters():
        parameter.data = parameter.data.to(dtype)
        if not all_finite(parameter):
            raise OutputError(
                f"{name} holds numbers too large for {str(dtype).removeprefix('torch.')}; choose "
                "another --dtype"
            )
