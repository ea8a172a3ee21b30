"""Writes constraints.txt: every package that make demo, test and docs install, at one version, with its files' SHA-256.

    make lock        in the environment that has passed the tests, whose versions are taken

The sections are what the Makefile installs one after another, each with --no-deps and --require-hashes:

- train: what lorakin's command needs except torch, and setuptools, which builds lorakin itself
- cpu: torch's build for the CPU, as this machine is served it; other indexes than PyPI have it
- torch: PyPI's torch, where there is no other
- cuda: what that torch needs on Linux in addition
- kernels: what the kernels of the GPU's tests need on Linux, with the Triton that this torch needs
- test: what the tests need in addition
- docs: what `make docs` needs in addition
- deepspeed: for `make soak`, if it can be built

Hashes are those of all wheels for Python 3.11 to 3.13 on Linux and macOS that PyPI lists.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename

INDEX = "https://pypi.org/simple"
LOCK = Path(__file__).parent.parent / "constraints.txt"
PYTHONS = ("3.11", "3.12", "3.13")
TARGETS = [
    {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": platform, "platform_system": system,
        "platform_machine": machine, "os_name": "posix", "implementation_name": "cpython", "extra": "",
        "platform_python_implementation": "CPython",
    }
    for python in PYTHONS
    for platform, system, machine in (
        ("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64"),
    )
]  # fmt: skip
DEEPSPEED = {
    "deepspeed": "0.19.8", "einops": "0.8.2", "hjson": "3.1.0", "msgpack": "1.2.4", "ninja": "1.13.2", "py-cpuinfo": "9.0.0",
}  # fmt: skip
"""Named here, since it is built from source, and says only then what it needs."""
ELSEWHERE = {"audioop-lts": ("0.2.2", 'python_version >= "3.13"')}
"""Needed, by gradio, on a later Python than may be installed here: version and marker."""
HEAD = """\
# The versions and files that make demo, test and docs install. Written by `make lock` (tools/lock.py); do not edit.
"""


def needed(names: Iterable[str]) -> dict[str, str]:
    """Name -> version of these requirements and all that they need, on any target, as they are installed here."""
    found: dict[str, str] = {}
    done = set[tuple[str, frozenset[str]]]()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in done or _is_cuda(
            name
        ):  # the latter of a torch for CUDA, if that is what is installed here
            continue
        done.add((name, extras))
        if name in ELSEWHERE:
            found[name] = ELSEWHERE[name][0]
            continue
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            sys.exit(f"{requirement} is not installed here; run make test first")
        takes = SpecifierSet(dist.metadata.get("Requires-Python") or "")
        if missing := [python for python in PYTHONS if f"{python}.0" not in takes]:
            sys.exit(
                f"{name} {dist.version} needs Python {takes}, and the lock is for {missing[0]}.0, too; install an "
                "earlier version of it first"
            )
        found[name] = dist.version.partition("+")[0]
        waiting += [
            inner for inner in map(Requirement, dist.requires or ()) if _applies(inner, extras)
        ]
    return found


def _is_cuda(name: str) -> bool:
    return name.startswith(("nvidia-", "cuda-")) or name == "triton"


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({**there, "extra": extra}) for there in TARGETS for extra in ("", *extras)
    )


def cuda_of(torch: str) -> dict[str, str]:
    """What PyPI's torch needs of CUDA, as pip resolves it there."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | {
        "PIP_CONFIG_FILE": os.devnull
    }
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        "-",
    ]
    said = subprocess.run(
        [*command, "--index-url", INDEX, f"torch=={torch}"],
        env=plain,
        capture_output=True,
        check=True,
        text=True,
    )
    found = {
        canonicalize_name(one["metadata"]["name"]): one["metadata"]["version"]
        for one in json.loads(said.stdout)["install"]
    }
    return {name: version for name, version in found.items() if _is_cuda(name)}


def hashes(name: str, version: str) -> list[str]:
    """The SHA-256 of the files of a release that a target may take; of one without wheels, of its source."""
    request = urllib.request.Request(
        f"{INDEX}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    wheels, sources = set[str](), set[str]()
    for file in files:
        kind = sources if file["filename"].endswith((".tar.gz", ".zip")) else wheels
        if _is_of(file["filename"], version):
            kind.add(file["hashes"]["sha256"])
    if not (wheels or sources):
        sys.exit(f"{INDEX} has no files of {name} {version}")
    return sorted(wheels or sources)


def _is_of(filename: str, version: str) -> bool:
    try:
        if not filename.endswith(".whl"):
            return str(parse_sdist_filename(filename)[1]) == version
        _, found, _, tags = parse_wheel_filename(filename)
    except ValueError:
        return False
    return str(found) == version and any(_is_taken(tag) for tag in tags)


def _is_taken(tag: Any) -> bool:
    """Whether a Python and a platform that are supported may take a wheel of this tag."""
    platform = tag.platform == "any" or "linux" in tag.platform or tag.platform.startswith("macosx")
    number = re.fullmatch(r"(?:cp|py)3(\d*)", tag.interpreter)
    if not platform or number is None:
        return False
    minor = int(number[1] or 0)
    return (
        (minor <= 13)
        if tag.abi in ("none", "abi3")
        else (tag.abi == tag.interpreter and 11 <= minor <= 13)
    )


def served(requirement: str) -> tuple[str, str]:
    """Version and SHA-256 of the wheel that pip takes on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            requirement,
        ]
        subprocess.run(command, check=True)
        (file,) = Path(folder).iterdir()
        return str(parse_wheel_filename(file.name)[1]), hashlib.sha256(
            file.read_bytes()
        ).hexdigest()


def section(title: str, versions: dict[str, str]) -> str:
    """Lines of the lock between "# title" and "# end"."""
    entries = {
        pin(name, version): hashes(name, version) for name, version in sorted(versions.items())
    }
    return lines(title, entries)


def pin(name: str, version: str) -> str:
    """A requirement of exactly this version, where it is needed."""
    only = f" ; {ELSEWHERE[name][1]}" if name in ELSEWHERE else ""
    return f"{name}=={version}{only}"


def lines(title: str, entries: dict[str, list[str]]) -> str:
    """The same from requirement -> hashes."""
    written = [
        " \\\n".join([pin, *(f"    --hash=sha256:{one}" for one in found)])
        for pin, found in entries.items()
    ]
    return "\n".join([f"# {title}", *written, "# end", ""])


def main() -> None:
    """Write the lock."""
    train = needed(["lorakin[train]", "setuptools"])
    test = {
        name: version for name, version in needed(["lorakin[test]"]).items() if name not in train
    }
    docs = {
        name: version
        for name, version in needed(["lorakin[docs]"]).items()
        if name not in train and name not in test
    }
    kernels = {
        name: version for name, version in needed(["lorakin[gpu]"]).items() if name not in train
    }
    del train["lorakin"]
    torch = train.pop("torch")
    version, digest = served(f"torch=={torch}")
    if "+cpu" not in version:
        sys.exit(
            f"pip takes torch {version} here; make the lock where it is served a build for the CPU"
        )
    cuda = cuda_of(torch)
    kernels["triton"] = cuda["triton"]
    parts = [
        HEAD,
        section("train", train),
        lines("cpu", {f"torch=={version}": [digest]}),
        section("torch", {"torch": torch}),
        section("cuda", cuda),
        section("kernels", kernels),
        section("test", test),
        section("docs", docs),
        section("deepspeed", DEEPSPEED),
    ]
    LOCK.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
