"""How a model is kept: its dtype, its quantisation, its device."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from lorakin.errors import SettingError
from lorakin.training import processes

QUANTISATIONS: dict[str, tuple[str, Callable[[torch.dtype, list[str] | None], Any]]] = {
    "nf4": ("bitsandbytes", lambda dtype, skip: transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skip,
    )),
    "int8": ("bitsandbytes", lambda dtype, skip: transformers.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=skip
    )),
    "torchao-int8": ("torchao", lambda dtype, skip: transformers.TorchAoConfig(
        importlib.import_module("torchao.quantization").Int8WeightOnlyConfig(),
        modules_to_not_convert=skip,
    )),
}  # fmt: skip
"""What `quantize` may be → the package that it needs, and what makes transformers' config.

That takes the dtype to compute in, and the modules that stay as they are (None: the head).
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quantisation(word: str) -> Callable[[torch.dtype, list[str] | None], Any]:
    """Returns what makes transformers' config for a word of `QUANTISATIONS`.

    Raises:
        SettingError: an unknown word, or its package is missing.
    """
    if word not in QUANTISATIONS:
        raise SettingError(f"quantize must be one of {', '.join(QUANTISATIONS)}, not {word!r}")
    package, config = QUANTISATIONS[word]
    if importlib.util.find_spec(package) is None:
        raise SettingError(
            f"quantize={word} needs {package}: pip install 'lorakin[quantised]', or pip install "
            f"{package}"
        )
    return config


def best_device() -> torch.device:
    """Returns a GPU, this process's own if there are several processes; else the CPU."""
    if processes.count() > 1:
        return torch.device(processes.joined().device)
    accelerator = torch.accelerator.current_accelerator()
    return (
        accelerator
        if accelerator is not None and torch.accelerator.is_available()
        else torch.device("cpu")
    )


def resolve_dtype(dtype: str, classification: bool = False) -> str:
    """Returns the dtype that a user asked for, with "auto" decided.

    "auto" is float32 for a classifier, whose new head learns in the model's dtype; for others it is
    the fastest.

    Raises:
        SettingError: an unknown dtype.
    """
    if dtype == "auto":
        return "float32" if classification else processes.agreed(fastest_dtype())
    if dtype not in (*DTYPES, "base"):
        raise SettingError(f"dtype must be auto, base, {', '.join(DTYPES)}, not {dtype!r}")
    return dtype


def fastest_dtype() -> str:
    """Returns "bfloat16" if this machine multiplies matrices faster in it, else "float32".

    On a CPU it is measured, in about 50 ms.
    """
    if best_device().type != "cpu":
        return (
            "bfloat16"
            if torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            else "float32"
        )

    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for _ in range(12):  # in turns, and the best of each, so that a busy machine misleads it less
        for dtype in best:
            x, weight = torch.ones(512, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
            start = time.perf_counter()
            nn.functional.linear(x, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return "bfloat16" if best[torch.bfloat16] < 0.8 * best[torch.float32] else "float32"
