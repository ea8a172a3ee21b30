"""JSON files that strangers made: read only up to a length, and only if they hold one object."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakin.errors import AdapterError
from lorakin.storage import files

MOST_JSON = 1 << 26
"""Bytes of a JSON file; the largest mixtures of experts need some ten million."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        AdapterError: there is no such file; it holds no JSON, or no object, or a key twice.
    """
    try:
        content = files.content(path, MOST_JSON)
    except FileNotFoundError:
        raise no_json(path) from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error})") from None
    return parsed(path, content)


def no_json(path: Path) -> AdapterError:
    """The error for an adapter's directory without the file `path`."""
    if named := sorted(inner.parent.name for inner in path.parent.glob(f"*/{path.name}")):
        return AdapterError(
            f"{path.parent} holds adapters in directories of their own ({', '.join(named)}); load "
            "one of them"
        )
    return AdapterError(f"{path.parent} has no {path.name}; is it an adapter's directory?")


def parsed(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object in `content`, which the file `path` holds; raises `AdapterError` if none."""
    if len(content) > MOST_JSON:
        raise AdapterError(f"{path} is longer than {MOST_JSON:,} bytes, too long for such a file")
    try:
        said = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(said, dict):
        raise AdapterError(f"{path} holds {type(said).__name__}, expected an object")
    return said


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys: readers differ in which of the two they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands in it twice")
    return content


def written(content: Mapping[str, Any]) -> bytes:
    """The file's bytes of a JSON object."""
    return (json.dumps(content, indent=2) + "\n").encode()


def sha256(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
