"""Whether the packages that speed things up really compute here: each is tried, not only found."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

WORKS, FAILS, UNUSED = "✔", "✗", "–"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of trying a package.

    Attributes:
        name: of the package.
        works: whether it computed; None if nothing here would use it.
        said: what was found, in words.
        advice: what to do; "" if nothing.
    """

    name: str
    works: bool | None
    said: str
    advice: str = ""

    @property
    def mark(self) -> str:
        """One letter for `works`."""
        return UNUSED if self.works is None else WORKS if self.works else FAILS


def device() -> torch.device:
    """Returns where models run here: a GPU, or the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        return accelerator
    return torch.device("cpu")


def run_all(where: torch.device) -> list[Finding]:
    """Tries everything on this device."""
    return [
        _triton(where),
        _liger(where),
        _tried("bitsandbytes", "quantised", "--quantize nf4 and int8", lambda: _nf4(where)),
        _tried("torchao", "quantised", "--quantize torchao-int8", lambda: _torchao(where)),
    ]


def _tried(
    package: str, extra: str, use: str, compute: Callable[[], None], advice: str = ""
) -> Finding:
    """Computes something small with a package, whatever it raises."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        line = f"pip install 'lorakin[{extra}]'   # for {use}"
        return Finding(package, False, f"not installed; it is for {use}", line)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compute()
    except Exception as error:  # a package, a compiler or a driver may fail in any way
        reason = str(error).strip().partition("\n")[0]
        said = f"installed, but it fails: {type(error).__name__}: {reason}"
        return Finding(package, False, said, advice)
    return Finding(package, True, f"computes here; it is for {use}")


def _triton(where: torch.device) -> Finding:
    use = "fast dropout, DoRA and --fuse on an NVIDIA GPU"
    if where.type != "cuda":
        return Finding("triton", None, f"not used without an NVIDIA GPU; it is for {use}")

    def compute() -> None:
        from lorakin.kernels.triton_operators import are_usable

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if not are_usable(where):
                raise RuntimeError("the GPU is older than Ampere, which the kernels need")

    return _tried("triton", "gpu", use, compute, "apt install gcc   # Triton needs a C compiler")


def _liger(where: torch.device) -> Finding:
    use = "lighter and faster --fuse on a GPU"
    if where.type != "cuda":
        return Finding("liger-kernel", None, f"not used without a GPU; it is for {use}")

    def compute() -> None:
        from lorakin.kernels.liger_operators import fit

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if not fit(torch.ones(1, 8, device=where)):
                raise RuntimeError("its kernels do not run here")

    return _tried("liger-kernel", "gpu", use, compute, "pip install -U 'lorakin[gpu]'")


def _nf4(where: torch.device) -> None:
    bnb: Any = importlib.import_module("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to(where)
    layer(torch.ones(2, 64, device=where))


def _torchao(where: torch.device) -> None:
    quantization: Any = importlib.import_module("torchao.quantization")
    layer = nn.Sequential(nn.Linear(64, 64)).to(where)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    layer(torch.ones(2, 64, device=where))
