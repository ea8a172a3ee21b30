"""What this machine and its packages can do for lorakin, as text for a bug report.

Nothing here needs more than torch, and nothing fails because something is missing: it is reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lorakin.training import doctor_checks
from lorakin.training.doctor_checks import Finding

BESIDE = ("huggingface_hub", "tokenizers", "triton", "peft", "trl")
"""Packages that lorakin does not ask for, and that it meets."""
NOT_FOR_USERS = ("docs", "test", "all")
"""Extras of those who work on lorakin."""
REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+\b)(?!\[)[^;]*(;.*extra == ['\"](?P<extra>[\w-]+)['\"])?"
)
"""A line of a package's metadata."""
MEASURED_SECONDS = 0.25
"""How long products are timed in each dtype."""
PATHS = re.compile(r"(?<![\w.~/\\])(?<!http:)(?<!https:)(?:[A-Za-z]:\\|/)(?:[^\s'\":,;()]+[/\\])+")
"""The directories of an absolute path."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        versions: of lorakin, Python, torch, CUDA, the driver, and the system's name.
        packages: a package → its version, or None if it is not installed.
        devices: each device's name, and its memory in bytes, all of it and what is free.
        speeds: a dtype → the floating-point operations per second of large products in it, or
            None if the device has none.
        auto_dtype: what `--dtype auto` is here for a language model; None if it is not known.
        checks: whether the packages that speed things up really work here.
        disks: a place → the bytes that are free there.
        advice: what is missing, and how to get it.
    """

    versions: dict[str, str]
    packages: dict[str, str | None]
    devices: list[dict[str, Any]]
    speeds: dict[str, float | None]
    auto_dtype: str | None
    checks: list[Finding]
    disks: dict[str, int]
    advice: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Returns it for `--json`, without names of users and private paths."""
        content: dict[str, Any] = cleaned(dataclasses.asdict(self))
        return content

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yields a label and a text for each line, without names of users and private paths."""
        for label, text in self._lines():
            yield label, cleaned(text)

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())
        there = {name: version for name, version in self.packages.items() if version is not None}
        yield "packages", ", ".join(f"{name} {version}" for name, version in there.items())
        if absent := [name for name in self.packages if name not in there]:
            yield "not there", ", ".join(absent)
        for device in self.devices:
            memory = f"{_gib(device['memory'])} of memory, {_gib(device['free'])} free"
            yield "device", f"{device['name']}: {memory}"
        speeds = [f"{name} {_speed(flops)}" for name, flops in self.speeds.items()]
        auto = f"; --dtype auto is {self.auto_dtype}" if self.auto_dtype else ""
        yield "products", ", ".join(speeds) + auto
        for check in self.checks:
            yield check.name, f"{check.mark} {check.said}"
        for place, free in self.disks.items():
            yield "disk", f"{_gib(free)} free in {place}"
        for line in self.advice:
            yield "to do", line


def diagnose() -> Diagnosis:
    """Looks at the machine; it takes a few seconds."""
    extras = _extras()
    packages = {name: _version(name) for name in (*extras, *BESIDE)}
    versions = _versions()
    device = doctor_checks.device()
    checks = doctor_checks.run_all(device)
    return Diagnosis(
        versions,
        packages,
        _devices(),
        speeds(device),
        _auto_dtype(),
        checks,
        _disks(),
        _advice(
            [name for name in extras if extras[name] == "train" and not packages[name]],
            checks,
            versions,
        ),
    )


def _extras() -> dict[str, str | None]:
    """Returns the packages that lorakin's metadata asks for → the extra that brings them."""
    lines: list[str] = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        lines = importlib.metadata.requires("lorakin") or []
    found = [match for line in lines if (match := REQUIREMENT.match(line))]
    return {
        match["name"]: match["extra"]
        for match in found
        if match["name"] not in ("lorakin", "torch") and match["extra"] not in NOT_FOR_USERS
    }


def _versions() -> dict[str, str]:
    versions = {
        "lorakin": _version("lorakin") or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
    }
    if torch.version.hip:
        versions["ROCm"] = torch.version.hip
    if driver := _driver():
        versions["driver"] = driver
    return versions | {"system": f"{platform.system()} {platform.release()} {platform.machine()}"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Returns the version of NVIDIA's driver; None if there is none."""
    if (command := shutil.which("nvidia-smi")) is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return next(iter(said.split()), None)
    return None


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count()):
        free, memory = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found.append({"name": f"cuda:{number} {name}", "memory": memory, "free": free})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "memory": None, "free": None})
    cpu: dict[str, Any] = {"memory": None, "free": None}
    with contextlib.suppress(ImportError):
        import psutil

        cpu = {"memory": psutil.virtual_memory().total, "free": psutil.virtual_memory().available}
    name = f"cpu, {torch.get_num_threads()} threads on {os.cpu_count()} processors"
    return [*found, {"name": name, **cpu}]


def speeds(device: torch.device) -> dict[str, float | None]:
    """Returns how many floating-point operations per second large products take in each dtype.

    Args:
        device: where they are computed.
    """
    return {
        str(dtype).removeprefix("torch."): _product_speed(device, dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }


def _product_speed(device: torch.device, dtype: torch.dtype) -> float | None:
    side = 512 if device.type == "cpu" else 4096
    try:
        x = torch.ones(side, side, dtype=dtype, device=device)
        best, until = float("inf"), time.perf_counter() + MEASURED_SECONDS
        while best == float("inf") or time.perf_counter() < until:
            start = time.perf_counter()
            x @ x
            if device.type != "cpu":
                torch.accelerator.synchronize()
            best = min(best, time.perf_counter() - start)
    except (RuntimeError, TypeError):  # the device has no such products
        return None
    return 2 * side**3 / best


def _auto_dtype() -> str | None:
    try:
        from lorakin.training.precision import fastest_dtype
    except Exception:  # transformers is missing, or broken in any way
        return None
    return fastest_dtype()


def _disks() -> dict[str, int]:
    """Returns the free space here, and where models are kept."""
    caches = {"this directory": Path.cwd()}
    with contextlib.suppress(Exception):  # transformers is missing, or broken in any way
        from huggingface_hub import constants

        from lorakin.training.gguf_cache import cache_directory

        hub = Path(constants.HF_HUB_CACHE)
        caches |= {f"the hub's cache, {hub}": hub}
        caches |= {f"lorakin's cache, {cache_directory()}": cache_directory()}
    found = {}
    for name, path in caches.items():
        there = next((one for one in (path, *path.parents) if one.exists()), path)
        with contextlib.suppress(OSError):
            found[name] = shutil.disk_usage(there).free
    return found


def _advice(absent: list[str], checks: list[Finding], versions: dict[str, str]) -> list[str]:
    """Returns what to install, with the line that does it."""
    lines = [check.advice for check in checks if check.advice]
    if absent:
        lines.append(f"pip install 'lorakin[train]'   # the command needs {', '.join(absent)}")
    if "driver" in versions and not torch.cuda.is_available():
        lines.append(
            "pip install --force-reinstall torch   # there is an NVIDIA driver, but torch sees no "
            "GPU: this torch is another build, or the driver is older than it needs"
        )
    return lines


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def _speed(flops: float | None) -> str:
    return "not there" if flops is None else f"{flops / 1e9:,.0f} GFLOP/s"


def cleaned(value: Any) -> Any:
    """Returns a text, or all texts in lists and objects, without private names.

    >>> cleaned("/srv/secret/lib.so is not there")
    '…/lib.so is not there'
    """
    if isinstance(value, dict):
        return {cleaned(key): cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item) for item in value]
    if not isinstance(value, str):
        return value
    for private, public in _private().items():
        value = value.replace(private, public)
    return PATHS.sub("…/", value)


def _private() -> dict[str, str]:
    """Returns what says who and where: a text → what stands for it."""
    found = {sys.prefix: "<environment>", str(Path.home()): "~"}
    with contextlib.suppress(OSError, KeyError, ImportError):
        found |= {f"/{getpass.getuser()}/": "/<user>/", f"\\{getpass.getuser()}\\": "\\<user>\\"}
    if len(platform.node()) > 2:
        found[platform.node()] = "<machine>"
    return found
