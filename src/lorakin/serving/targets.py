"""What an adapter can be exported to: how each target is written, and how it is read back."""

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
from lorakin.serving.generation_config import write_stop_ids
from lorakin.serving.job import ExportJob
from lorakin.serving.merged import NotStreamed, StreamedMerge
from lorakin.serving.other_files import copy_other_files
from lorakin.switching import adapters
from lorakin.training.base_class import own_class
from lorakin.training.chat_templates import TEMPLATE, remembered_template
from lorakin.training.loading import quiet_loading
from lorakin.training.model_sources import PACKAGED, directory_of, packaged
from lorakin.training.models import Loaded, config_of, load_model, load_tokenizer
from lorakin.training.precision import DTYPES
from lorakin.training.with_adapter import load_with_adapter

GGUF_ADAPTER, GGUF_MODEL, MODELFILE = "adapter.gguf", "model.gguf", "Modelfile"
GGUF_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}


class ExportTarget:
    """A form in which `lorakin export` writes an adapter."""

    name: ClassVar[str]
    """The word after `--to`."""
    dtypes: ClassVar[tuple[str, ...]]
    """The dtypes that it is written in, the first by default."""
    is_pairs: ClassVar[bool]
    """Whether it holds low-rank pairs for the base, so that `--rank` and `--error` apply."""

    @staticmethod
    def write(job: ExportJob, folder: Path) -> None:
        """Writes the result into the empty directory `folder`."""
        raise NotImplementedError

    @staticmethod
    def read(job: ExportJob, folder: Path) -> Any:
        """Returns the model that `folder` holds, to compare it with the trained one."""
        raise NotImplementedError


class PlainLoRA(ExportTarget):
    """An adapter in PEFT's layout, which every program that serves LoRA reads."""

    name: ClassVar[str] = "lora"
    dtypes = ("float32", "float16", "bfloat16")
    is_pairs = True

    @staticmethod
    def write(job: ExportJob, folder: Path) -> None:
        plain = job.add_plain_lora()
        if job.request.dtype is not None:
            _narrow(plain, DTYPES[job.request.dtype])
        original = next(iter(adapters(job.loaded().model).values()))
        worst = max((fit.error for fit in job.fits.values()), default=0.0)
        nearest = {"Nearest pairs": f"largest relative error {worst:.3g}"} if worst else {}
        plain.save(folder, notes={"Made from": in_words(original.method), **nearest})
        _carry_template(job, folder)

    @staticmethod
    def read(job: ExportJob, folder: Path) -> Any:
        model = job.base_alone().model
        load(model, folder, other_base=job.request.other_base)
        return model


class MergedModel(ExportTarget):
    """A transformers directory that no longer needs lorakin."""

    name = "merged"
    dtypes = ("base", "float32", "float16", "bfloat16")
    is_pairs = False

    @staticmethod
    def write(job: ExportJob, folder: Path) -> None:
        job.forget()
        dtype = DTYPES.get(job.request.dtype or "")
        try:
            _streamed_merge(job, dtype).write(folder)
        except NotStreamed:
            loaded = _merge_in_memory(job, "base" if dtype is None else "float32")
            with quiet_loading():
                loaded.model.to(dtype).save_pretrained(folder)
            copy_other_files(directory_of(job.name), folder)
        _carry_template(job, folder)
        write_stop_ids(folder)

    @staticmethod
    def read(job: ExportJob, folder: Path) -> Any:
        config = config_of(str(folder))
        cls = own_class(config) or transformers.AutoModelForCausalLM
        return load_model(str(folder), "base", cls=cls).model


class GGUFAdapter(ExportTarget):
    """A LoRA for llama.cpp, with a Modelfile for Ollama."""

    name = "gguf"
    dtypes = ("float32", "float16", "bfloat16")
    is_pairs = True

    @staticmethod
    def write(job: ExportJob, folder: Path) -> None:
        loaded, plain = job.loaded(), job.add_plain_lora()
        if whole_modules := plain.placement.whole_modules:
            raise AdapterError(
                f"a GGUF adapter cannot hold modules trained whole ({', '.join(whole_modules)}); "
                "use --to gguf-merged"
            )
        if tables := list(plain.placement.tokens):
            raise AdapterError(
                f"a GGUF adapter cannot hold trained token rows ({', '.join(tables)}); use --to "
                "gguf-merged"
            )
        if biases := plain.placement.biases:
            raise AdapterError(
                f"a GGUF adapter cannot hold biases ({some(biases)}); use --to gguf-merged"
            )
        pairs = {path: plain.tensors.saved_change(path) for path in plain.placement.methods}
        gguf_adapter.write_adapter(
            folder / GGUF_ADAPTER, loaded.model.config, pairs, dtype=_gguf_dtype(job, "float32")
        )
        base = packaged(job.name) if job.name in PACKAGED else Path(job.name).resolve()
        source = str(base) if base.suffix == ".gguf" else "./base.gguf"
        text = ollama.modelfile(source, f"./{GGUF_ADAPTER}", loaded.tokenizer)
        (folder / MODELFILE).write_text(text, encoding="utf-8")

    @staticmethod
    def read(job: ExportJob, folder: Path) -> Any:
        model = job.base_alone().model
        insert_pairs(
            model, "written", gguf_adapter.read_adapter(folder / GGUF_ADAPTER, model.config)
        )
        return model


class GGUFModel(ExportTarget):
    """A model for llama.cpp, with a Modelfile for Ollama."""

    name = "gguf-merged"
    dtypes = ("float16", "float32", "bfloat16", "q8_0")
    is_pairs = False

    @staticmethod
    def write(job: ExportJob, folder: Path) -> None:
        job.forget()
        source = directory_of(job.name)
        tensors: Mapping[str, Tensor]
        try:
            # In float32, so that only the file's dtype rounds.
            tensors = merged = _streamed_merge(job, torch.float32)
            config = merged.config
        except NotStreamed:
            model = _merge_in_memory(job, "float32").model
            tensors, config = model.state_dict(), model.config
        dtype = _gguf_dtype(job, "float16")
        template, tokenizer = remembered_template(job.files.path), load_tokenizer(str(source))
        tokenizer.chat_template = template or tokenizer.chat_template
        name = Path(job.name).name
        gguf_model.write_model(
            folder / GGUF_MODEL, config, source, tensors, dtype=dtype, name=name, template=template
        )
        (folder / MODELFILE).write_text(
            ollama.modelfile(f"./{GGUF_MODEL}", None, tokenizer), encoding="utf-8"
        )

    @staticmethod
    def read(job: ExportJob, folder: Path) -> Any:
        return gguf_model.read_model(folder / GGUF_MODEL, directory_of(job.name))


TARGETS: dict[str, type[ExportTarget]] = {
    target.name: target for target in (PlainLoRA, MergedModel, GGUFAdapter, GGUFModel)
}


def _carry_template(job: ExportJob, folder: Path) -> None:
    """Writes the chat template that the adapter was trained with, if it is not the base's."""
    if (template := remembered_template(job.files.path)) is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def _streamed_merge(job: ExportJob, dtype: torch.dtype | None) -> StreamedMerge:
    base, other_base = directory_of(job.name), job.request.other_base
    return StreamedMerge(base, job.files, job.base_class(), dtype, other_base)


def _merge_in_memory(job: ExportJob, dtype: str) -> Loaded:
    """Returns the whole model in memory, with the adapter folded in."""
    loaded = load_with_adapter(
        job.name, job.files, dtype, other_base=job.request.other_base, any_head=True
    )
    for adapter in adapters(loaded.model).values():
        adapter.merge(permanent=True)
    return loaded


def _gguf_dtype(job: ExportJob, default: str) -> str:
    return GGUF_DTYPES[job.request.dtype or default]


def _narrow(adapter: Adapter, dtype: torch.dtype) -> None:
    """Casts all tensors to `dtype`.

    Raises:
        OutputError: a value becomes infinite.
    """
    for name, parameter in adapter.named_parameters():
        parameter.data = parameter.data.to(dtype)
        if not all_finite(parameter):
            raise OutputError(
                f"{name} holds values too large for {str(dtype).removeprefix('torch.')}; choose "
                "another --dtype"
            )
