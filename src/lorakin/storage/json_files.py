"""JSON files from outside: read only up to a length, and only if they hold one object."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakin.errors import AdapterError
from lorakin.storage import files

MOST_JSON = 1 << 26
"""The most bytes of a JSON file; the largest mixtures of experts need some ten million."""


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in the file `path`.

    Raises:
        AdapterError: there is no such file; it is not JSON, is not an object, or has a key twice.
    """
    try:
        content = files.read_limited(path, MOST_JSON)
    except FileNotFoundError:
        raise no_json(path) from None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error})") from None
    return parsed(path, content)


def no_json(path: Path) -> AdapterError:
    """Returns the error for an adapter's directory without the file `path`."""
    if named := sorted(inner.parent.name for inner in path.parent.glob(f"*/{path.name}")):
        return AdapterError(
            f"{path.parent} holds adapters in directories of their own ({', '.join(named)}); load "
            "one of them"
        )
    return AdapterError(f"{path.parent} has no {path.name}; is it an adapter's directory?")


def parsed(path: Path, content: bytes) -> dict[str, Any]:
    """Returns the JSON object in `content`, read from `path`; raises `AdapterError` if none."""
    if len(content) > MOST_JSON:
        raise AdapterError(f"{path} is longer than {MOST_JSON:,} bytes, too long for such a file")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; a repeated key is a `ValueError`, since readers differ on it."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands in it twice")
    return content


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Returns a JSON object as the content of a file."""
    return (json.dumps(content, indent=2) + "\n").encode()


def sha256(content: bytes) -> str:
    """Returns the SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
