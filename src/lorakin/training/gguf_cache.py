"""GGUF files as transformers' directories, dequantised to float32 once and kept in a cache.

An entry of the cache is named after every byte of its file: to read that file once more takes an
eighth of the time that loading the result takes. The entry records its own files, so a damaged one
is made again. One process converts at a time, under a lock that ends with it. What is half made has
another name, and whoever has the lock removes it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers

from lorakin.errors import LorakinWarning, ModelError
from lorakin.storage import locks
from lorakin.training import gguf_header, loading
from lorakin.training.model_files import first_line
from lorakin.waiting import waiting

DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""llama.cpp's names of tokenizers that take a number digit by digit."""
CONVERSION = 3
"""Raised when what is made of a GGUF file changes, so that no old one is taken from the cache."""
MADE = ("rope_freqs", "rope_factors")
"""Tensors that a config says as well, as numbers of its rotation."""
RECORD, LOCK, HALF = "conversion.json", ".lock", ".converting-"
BESIDE = "lorakin-"
"""Begins the name of a directory beside an unwritable cache; the process's number follows."""


def cache_directory() -> Path:
    """Returns where converted models are kept: `LORAKIN_CACHE`, or in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakin"
    return Path(os.environ.get("LORAKIN_CACHE") or default)


def converted(path: Path) -> Path:
    """Returns the model in a GGUF file as a directory that transformers loads.

    It comes from the cache if it is there. If the cache cannot be written, it is made in a
    temporary directory, which is removed when the process ends.

    Raises:
        ModelError: the file holds no model that can be read, or there is no room for it.
    """
    gguf_header.check_model(path)
    digest = _digest(path.resolve(), _stamp(path))
    entry = _entry(path, digest)
    for place in (entry, _standing_in.get(digest)):
        if place is not None and is_whole(place):
            return place
    # The file is read once, even if the cache then cannot be written.
    make = functools.cache(lambda: _read(path))
    try:
        with _cache_lock(entry.parent):
            if not is_whole(entry):  # another process may have been faster
                _put(entry, make)
        return entry
    except OSError as error:
        return _beside(entry, digest, make, error)


def config(path: Path, **options: Any) -> Any:
    """Returns the config of the model in a GGUF file, without converting it.

    Raises:
        ModelError: the file holds no model that can be read.
    """
    gguf_header.check_model(path)
    entry = _entry(path, _digest(path.resolve(), _stamp(path)))
    if is_whole(entry):
        return loading.config(entry, **options)
    with (
        loading.as_model_error(f"{path} cannot be read as a GGUF model"),
        _isolated(path) as folder,
    ):
        return loading.config(folder, gguf_file=path.name, **options)


def _entry(path: Path, digest: str) -> Path:
    return cache_directory() / f"{path.stem[:60]}-{digest[:16]}"


def is_whole(entry: Path) -> bool:
    """Returns whether a directory is a conversion with all of its files as they were written."""
    try:
        files = json.loads((entry / RECORD).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(
            _is_as_written(entry / name, *stamp) for name, stamp in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_as_written(file: Path, size: int, changed: int, digest: str) -> bool:
    """Returns whether a file has this content.

    It is read only if it was touched since: the system tells when, and nobody else can set that.
    """
    stat = file.lstat()
    return stat.st_size == size and (stat.st_ctime_ns == changed or _sha256(file) == digest)


def _put(entry: Path, make: Callable[[], tuple[Any, Any]]) -> None:
    """Makes an entry, in the place of a damaged one; called under the lock.

    Raises:
        OSError: it cannot be written.
        ModelError: it cannot be made.
    """
    # Left behind by processes that were killed: this one has the lock.
    for half in entry.parent.glob(f"{HALF}*"):
        shutil.rmtree(half, ignore_errors=True)
    half = Path(tempfile.mkdtemp(prefix=HALF, dir=entry.parent))
    try:
        new = half / "new"
        _write(new, *make())
        if entry.exists():
            entry.rename(half / "damaged")
        new.rename(entry)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _write(folder: Path, model: Any, tokenizer: Any) -> None:
    try:
        with loading.quiet_loading():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        files = {}
        for file in sorted(folder.iterdir()):
            files[file.name] = [(stat := file.stat()).st_size, stat.st_ctime_ns, _sha256(file)]
        (folder / RECORD).write_text(
            json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8"
        )
    except (SafetensorError, RuntimeError) as error:  # how libraries report a full disk
        raise OSError(first_line(error)) from error


_standing_in: dict[str, Path] = {}
"""Digest → the temporary directory of a model that could not be put into the cache."""


def _beside(entry: Path, digest: str, make: Callable[[], tuple[Any, Any]], error: OSError) -> Path:
    reason = error.strerror or str(error)
    place = None
    try:
        place = Path(tempfile.mkdtemp(prefix=f"{BESIDE}{os.getpid()}-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        _write(place / entry.name, *make())
    except OSError as another:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        raise ModelError(
            f"the converted model can be written neither into {entry.parent} ({reason}) nor into "
            f"{tempfile.gettempdir()} ({another.strerror or another}); make room, or set "
            "LORAKIN_CACHE to a directory that has some"
        ) from error
    warnings.warn(
        f"the converted model cannot be kept in {entry.parent} ({reason}), so it is made again "
        "each time; set LORAKIN_CACHE to a directory that can be written",
        LorakinWarning,
        stacklevel=4,
    )
    _standing_in[digest] = place / entry.name
    return place / entry.name


def _remove_abandoned() -> None:
    """Removes what processes that were killed left in the temporary directory."""
    for place in Path(tempfile.gettempdir()).glob(f"{BESIDE}[0-9]*-*"):
        owner = place.name.removeprefix(BESIDE).partition("-")[0]
        with contextlib.suppress(OSError, ValueError):
            if (
                place.is_dir()
                and not place.is_symlink()
                and place.stat().st_uid == os.getuid()
                and not _lives(int(owner))
            ):
                shutil.rmtree(place, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def _cache_lock(cache: Path) -> Iterator[None]:
    """Holds the cache's lock, which the system takes back from a process that is killed.

    Raises:
        OSError: the cache cannot be written.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with locks.locked(cache / LOCK, wait=math.inf):
        yield


@contextlib.contextmanager
def _isolated(path: Path) -> Iterator[Path]:
    """Yields a directory that holds only the file, so no config or code next to it is read."""
    with tempfile.TemporaryDirectory(prefix=f"{BESIDE}{os.getpid()}-") as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def _read(path: Path) -> tuple[Any, Any]:
    """Returns the model and the tokenizer in a GGUF file.

    Raises:
        ModelError: it cannot be read, or lacks weights, which would be random.
    """
    with waiting(f"dequantising {path.name}"):
        return _dequantised(path)


def _dequantised(path: Path) -> tuple[Any, Any]:
    _remove_abandoned()
    header = gguf_header.check_model(path)
    numbers = 2 * sum(header.count(name) for name in header.tensors) + 10**7  # twice: a tied head
    with (
        loading.as_model_error(f"{path} cannot be read as a GGUF model"),
        _isolated(path) as folder,
    ):
        with loading.limited_size(50 * len(header.tensors) + 2000, numbers, str(path)):
            model, found = loading.model(
                transformers.AutoModelForCausalLM,
                folder,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=transformers.GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        if missing := sorted(set(found["missing_keys"]) & dict(model.named_parameters()).keys()):
            raise ModelError(
                f"{path} lacks {missing[0]}, {len(missing)} in all, so it is not a whole language "
                "model"
            )
        _say_what_is_left(path, header, model)
        tokenizer = loading.tokenizer(folder, gguf_file=path.name)
        if header.values.get(gguf.Keys.Tokenizer.PRE) in DIGIT_SPLITTERS:
            _split_digits(tokenizer)
    return model, tokenizer


def _say_what_is_left(path: Path, header: gguf_header.Header, model: Any) -> None:
    """Warns of numbers in the file that the model does not use: its loader passes over what it does
    not know.
    """
    held = sum(header.count(name) for name in header.tensors if not name.startswith(MADE))
    used = sum(parameter.numel() for parameter in model.parameters())
    if held > used:
        warnings.warn(
            f"{path} holds {held - used:,} numbers more than the {type(model).__name__} that is "
            "made of it, so some of its tensors are left out: it may be of another kind than "
            "transformers knows",
            LorakinWarning,
            stacklevel=5,
        )


def _split_digits(tokenizer: Any) -> None:
    """Cuts numbers into digits, as the file says and transformers forgets."""
    cuts = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.lru_cache
def _digest(path: Path, stamp: tuple[int, ...]) -> str:
    """Of a file's content, and of what is made of it. Read again only if the file was touched."""
    return hashlib.sha256(f"{_sha256(path)}|{CONVERSION}".encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
