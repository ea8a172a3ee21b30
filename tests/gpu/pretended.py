"""A pretended GPU: after this import, torch has two CUDA devices that compute on the CPU.

    PYTHONPATH=tests python -m pytest -p gpu.pretended tests/gpu

It must be imported before torch, which looks for CUDA once, when it is imported. So it is a pytest
plugin, and the tests of this directory run in processes of their own (see `tests/test_gpu.py`).

Tensors there are plain tensors with values. `pretended.cpp` says what is real and what is not.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu import interpreted

SOURCE = Path(__file__).with_name("pretended.cpp")
DEVICES = 2


def library() -> Path:
    """Returns the compiled library; compiles it (some 15 seconds) for each new source or torch.

    Raises:
        subprocess.CalledProcessError: g++ refuses it.
        FileNotFoundError: there is no g++.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_dir = Path(spec.origin).parent
    version = (torch_dir / "version.py").read_bytes()
    key = hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"lorakin-pretended-gpu-{os.getuid()}-{key}.so"
    if built.exists():
        return built

    include, lib = torch_dir / "include", torch_dir / "lib"
    partial = built.with_suffix(f".{os.getpid()}")
    subprocess.run(
        [
            "g++", "-O1", "-shared", "-fPIC", "-std=c++20", "-w", str(SOURCE), "-o", str(partial),
            f"-I{include}", f"-I{include}/torch/csrc/api/include",
            f"-I{sysconfig.get_paths()['include']}",
            f"-L{lib}", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{lib}",
        ],
        check=True,
    )  # fmt: skip
    partial.rename(built)
    return built


def install() -> None:
    """Loads the library, imports torch, and gives torch.cuda what its CUDA library would give."""
    assert "torch" not in sys.modules, "import gpu.pretended before torch"
    os.environ["TRITON_INTERPRET"] = "1"
    native = ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
    native.pretend_seed.argtypes = [ctypes.c_int, ctypes.c_uint64]

    import torch

    assert native.pretend_is_known()
    _install_devices(torch, native)
    _install_generators(torch, native)
    _install_storages(torch, native)
    _install_data_parallel(torch)
    _import_hidden(torch)
    interpreted.install()
    from gpu import plain_operators

    torch.cuda._lorakin_plain_operators = plain_operators.install()


def _index(native: Any, device: Any = None) -> int:
    import torch

    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return int(native.pretend_exchange_device(-1)) if index is None else index


def _install_devices(torch: Any, native: Any) -> None:
    cuda = torch.cuda
    properties = types.SimpleNamespace(
        name="Pretended", total_memory=80 << 30, major=9, minor=0, multi_processor_count=4,
        warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232448, L2_cache_size=50 << 20,
    )  # fmt: skip
    exchange, memory = native.pretend_exchange_device, native.pretend_memory
    memory.argtypes, memory.restype = [ctypes.c_int, ctypes.c_bool], ctypes.c_int64
    replacements = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: DEVICES,
        "current_device": lambda: exchange(-1),
        "set_device": lambda device: exchange(_index(native, device)) and None,
        # two functions of Python, by which a compiler tells them apart
        "_exchange_device": lambda device: exchange(device),
        "_maybe_exchange_device": lambda device: exchange(device),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "Pretended",
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
        "memory_allocated": lambda device=None: memory(_index(native, device), False),
        "max_memory_allocated": lambda device=None: memory(_index(native, device), True),
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: native.pretend_reset_peak(
            _index(native, device)
        ),
    }
    for name, function in replacements.items():
        setattr(cuda, name, function)
    cuda._initialized = True
    torch._C._cuda_getCurrentRawStream = lambda index: 0


def _install_generators(torch: Any, native: Any) -> None:
    def get(device: Any = "cuda") -> Any:
        state = torch.empty(1 << 14, dtype=torch.uint8)
        address = ctypes.c_void_p(state.data_ptr())
        return state[: native.pretend_get_state(_index(native, device), address)].clone()

    def put(state: Any, device: Any = "cuda") -> None:
        state = state.contiguous()
        address = ctypes.c_void_p(state.data_ptr())
        native.pretend_set_state(_index(native, device), address, ctypes.c_int64(state.numel()))

    def seed_all(seed: int) -> None:
        for device in range(DEVICES):
            native.pretend_seed(device, int(seed) % (1 << 64))

    def put_all(states: Any) -> None:
        for device, state in enumerate(states):
            put(state, device)

    replacements = {
        "get_rng_state": get,
        "set_rng_state": put,
        "get_rng_state_all": lambda: [get(device) for device in range(DEVICES)],
        "set_rng_state_all": put_all,
        "manual_seed": lambda seed: native.pretend_seed(_index(native), int(seed) % (1 << 64)),
        "manual_seed_all": seed_all,
        "_lazy_init": torch.cuda._lazy_init,
        "_is_in_bad_fork": torch.cuda._is_in_bad_fork,
    }
    for name, function in replacements.items():
        setattr(torch.cuda, name, function)
        setattr(torch.cuda.random, name, function)

    class Default(torch.Generator):  # type: ignore[misc]
        """A device's default generator. torch gives no handle of it without CUDA's library."""

        def __new__(cls, index: int) -> Default:
            generator: Default = super().__new__(cls, f"cuda:{index}")
            generator.index = index
            return generator

        def get_state(self) -> Any:
            return get(self.index)

        def set_state(self, state: Any) -> Default:
            put(state, self.index)
            return self

        def manual_seed(self, seed: int) -> Default:
            native.pretend_seed(self.index, int(seed) % (1 << 64))
            return self

    torch.cuda.default_generators = tuple(Default(index) for index in range(DEVICES))


def _install_storages(torch: Any, native: Any) -> None:
    """Moves and copies storages by tensors: torch does it in its CUDA library."""
    base, untyped = torch.storage._StorageBase, torch.UntypedStorage
    plain_to, plain_cpu, plain_clone, plain_copy = (
        base.to, base.cpu, base.clone, untyped.__deepcopy__,
    )  # fmt: skip

    def as_bytes(storage: Any) -> Any:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def to(self: Any, *args: Any, device: Any = None, **options: Any) -> Any:
        target = torch.device(args[0] if args else device)
        if "cuda" not in (self.device.type, target.type):
            return plain_to(self, target, **options)
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", _index(native))
        if self.device == target:
            return self
        return as_bytes(self).to(target, copy=True).untyped_storage()

    def clone(self: Any) -> Any:
        if self.device.type != "cuda":
            return plain_clone(self)
        return as_bytes(self).clone().untyped_storage()

    def deepcopy(self: Any, memo: dict[Any, Any]) -> Any:
        if self.device.type != "cuda":
            return plain_copy(self, memo)
        copies = memo.setdefault("torch", {})
        if self._cdata not in copies:
            copies[self._cdata] = self.clone()
        return copies[self._cdata]

    base.to, base.clone, untyped.clone = to, clone, clone
    base.cpu = lambda self: to(self, "cpu") if self.device.type == "cuda" else plain_cpu(self)
    base.cuda = lambda self, device=None, non_blocking=False: to(
        self, torch.device("cuda", _index(native, device))
    )
    base.__deepcopy__ = untyped.__deepcopy__ = deepcopy


def _install_data_parallel(torch: Any) -> None:
    """Gives nn.DataParallel what it asks of torch's CUDA library."""

    def scatter(tensor: Any, devices: Any, chunks: Any = None, dim: int = 0, _: Any = None) -> Any:
        sizes = len(devices) if chunks is None else list(chunks)
        parts = tensor.chunk(sizes, dim) if chunks is None else tensor.split(sizes, dim)
        return [part.to(f"cuda:{device}") for part, device in zip(parts, devices, strict=False)]

    def gather(tensors: Any, dim: int, destination: int | None = None) -> Any:
        return torch.cat([tensor.to(f"cuda:{destination or 0}") for tensor in tensors], dim)

    def broadcast(tensors: Any, devices: Any, _: int) -> Any:
        return [
            [t if n == 0 and t.device.index == d else t.to(f"cuda:{d}") for t in tensors]
            for n, d in enumerate(devices)
        ]

    torch._C._scatter = scatter
    torch._C._gather = gather
    torch._C._broadcast_coalesced = broadcast
    torch._C._broadcast = lambda tensor, devices: [tensor.to(f"cuda:{d}") for d in devices]
    import torch.nn.parallel._functions as functions

    functions._get_stream = lambda device: None


def _import_hidden(torch: Any) -> None:
    """Imports the libraries that look for CUDA when they are imported, and would call it."""
    with hidden(torch):
        import bitsandbytes
        import peft  # noqa: F401

    assert bitsandbytes
    _install_bitsandbytes(torch)


def _install_bitsandbytes(torch: Any) -> None:
    """Lets bitsandbytes' operators compute on the CPU: its CUDA library cannot be loaded."""
    from torch.utils._pytree import tree_map_only

    def install(name: str) -> None:
        operator = getattr(torch.ops.bitsandbytes, name).default

        @torch.library.register_kernel(f"bitsandbytes::{name}", "cuda")  # type: ignore[untyped-decorator]
        def kernel(first: Any, *args: Any) -> Any:
            on_cpu = tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), (first, *args))
            return tree_map_only(torch.Tensor, lambda t: t.to(first.device), operator(*on_cpu))

    for name in (
        "quantize_4bit", "quantize_blockwise", "dequantize_4bit", "dequantize_blockwise",
        "gemm_4bit",
    ):  # fmt: skip
        install(name)


@contextlib.contextmanager
def hidden(torch: Any) -> Iterator[None]:
    """Hides the pretended GPU inside a `with` block."""
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = available


install()
