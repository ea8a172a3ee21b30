"""Our Triton kernels compile for NVIDIA GPUs, with the blocks of real launches, and spill nothing.

No GPU is needed: Triton carries NVIDIA's assembler.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakin.kernels import liger_operators, triton_operators

pytest.importorskip("triton")
CAPABILITIES = [80, 90]
TOKENS = [512, 8192]
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(
        self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]
    ) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(side > 0 for side in grid)
        return lambda *args, **constants: self.launches.append((self.kernel, args, constants))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What is launched while the operators run on tensors without values."""
    from lorakin.kernels import triton_dropout, triton_gain, triton_gate, triton_rotary

    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    for module in (triton_dropout, triton_gain, triton_gate, triton_rotary):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), recorded))
    monkeypatch.setattr(triton_operators, "_on", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return recorded


def signature_of(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """Returns the source to compile, as a launch with these arguments would specialise it."""
    from triton.compiler import ASTSource

    types, divisible = {}, {}
    blocks = {name: value for name, value in constants.items() if name != "num_warps"}
    for n, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if value is None:
            types[name], blocks[name] = "constexpr", None
        elif isinstance(value, Tensor):
            types[name], divisible[(n,)] = f"*{NAMES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if value < 1 << 31 else "i64"
            if value % 16 == 0 and not kernel.params[n].do_not_specialize:
                divisible[(n,)] = [["tt.divisibility", 16]]
    types |= dict.fromkeys(blocks, "constexpr")
    return ASTSource(kernel, types, constexprs=blocks, attrs=divisible)


def bytes_spilled(cubin: bytes, tmp_path: Path) -> int:
    """Returns how many bytes a thread keeps outside its registers."""
    import triton.backends.nvidia as nvidia

    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    said = subprocess.run(
        [tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    return max(int(stack) for stack in re.findall(r"STACK:(\d+)", said))


@pytest.mark.parametrize(
    ("rank", "dtype"),
    [(16, torch.bfloat16), (64, torch.bfloat16), (128, torch.bfloat16), (8, torch.float16)],
)
def test_kernels_compile(
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]],
    rank: int,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    width, run, seed = 4096, triton_operators.IMPLEMENTATIONS, 1 << 61
    for tokens in TOKENS:
        x, back, down, up = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((tokens, width), (tokens, rank), (rank, width), (width, rank))
        )
        run["dropped_product"](x, down, seed, 6554)
        run["dropped_down_gradient"](back, x, 0.5, seed, 6554)
        run["dropped_input_product"](back, down, 0.5, seed, 6554)
        run["summed"](x.new_empty(3, rank, width, dtype=torch.float32), dtype)
        if tokens == TOKENS[0]:
            run["zeroed"](x, seed, 6554)
            run["changed_row_norms"](x.new_empty(width, width), up, down, 0.5)
            run["gain_gradient"](x, x, x.new_empty(width), x.new_empty(width), True)
    assert len(launches) == 11
    assert_compile(launches, tmp_path)


def test_another_seed_or_number_of_tokens_compiles_nothing(
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]],
) -> None:
    width, rank, run = 4096, 16, triton_operators.IMPLEMENTATIONS
    made = []
    for tokens, seed in ((8192, 1 << 61), (8191, (1 << 61) + 1)):
        x, back, down = (
            torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in ((tokens, width), (tokens, rank), (rank, width))
        )
        run["dropped_product"](x, down, seed, 6554)
        run["dropped_down_gradient"](back, x, 0.5, seed, 6554)
        run["dropped_input_product"](back, down, 0.5, seed, 6554)
        run["zeroed"](x, seed, 6554)
        run["gain_gradient"](x, x, None, x.new_empty(width), False)
        liger_operators._gated_backward(x[:, :-1], x[:, :-1], x[:, :-1])
        turned, angles = x.view(1, tokens, 32, 128).transpose(1, 2), x[:, :128].unsqueeze(0)
        liger_operators._rotated(turned, angles, angles, False)
        made.append([signature_of(*launch).hash() for launch in launches])
        launches.clear()
    assert len(made[0]) == 7
    assert made[0] == made[1]


def test_kernels_of_a_fused_model_compile(
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]], tmp_path: Path
) -> None:
    """The gate of 8B's shape, and its queries as they come and their gradients as they may."""
    gate = torch.empty(8192, 14336, dtype=torch.bfloat16, device="meta")
    liger_operators._gated_backward(gate, gate, gate)
    cos = torch.empty(1, 2048, 128, dtype=torch.bfloat16, device="meta")
    x = torch.empty(4, 2048, 32, 128, dtype=torch.bfloat16, device="meta")
    liger_operators._rotated(x.transpose(1, 2), cos, cos, False)
    liger_operators._rotated(x.view(4, 32, 2048, 128), cos.expand(4, -1, -1), cos, True)
    assert len(launches) == 3
    assert_compile(launches, tmp_path)


def assert_compile(
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]], tmp_path: Path
) -> None:
    from triton import compile
    from triton.backends.compiler import GPUTarget

    for kernel, args, constants in launches:
        source = signature_of(kernel, args, constants)
        for capability in CAPABILITIES:
            target = GPUTarget("cuda", capability, 32)
            made = compile(
                source, target=target, options={"num_warps": constants.get("num_warps", 4)}
            )
            # Eight bytes are an address that is kept once, outside the loops.
            assert bytes_spilled(made.asm["cubin"], tmp_path) <= 8, (kernel, constants, capability)
