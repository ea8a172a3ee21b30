"""The directory of a comparison: its files, whether it may be used, and its lock.

comparison.yaml   the options, and how the data was split
results.jsonl     one row for each trial that ended
report.html       the report
data/             the three parts of the data
trials/           one directory for each adapter that was kept, and a log for each trial
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from lorakin.compare.comparison import Comparison
from lorakin.compare.split import Parts
from lorakin.errors import OutputError, SettingError
from lorakin.storage import atomic, locks, paths
from lorakin.storage.schema import SchemaError, checked, short_repr
from lorakin.training.run_files import LOG
from lorakin.training.yaml_values import read_yaml

SETTINGS, RESULTS, REPORT, LOCK = "comparison.yaml", "results.jsonl", "report.html", ".lock"
TRIALS, DATA = "trials", "data"


@dataclasses.dataclass(frozen=True)
class Saved:
    """The content of comparison.yaml: the options, the data's parts, and the dtype of the model."""

    options: dict[str, Any]
    parts: Parts
    dtype: Literal["float32", "bfloat16", "float16"]


@contextlib.contextmanager
def locked(comparison: Comparison) -> Iterator[None]:
    """Holds the comparison's directory, so that no other process works in it.

    Raises:
        OutputError: another process holds it, or the directory cannot be made or used.
        SettingError: it holds a comparison with other options.
    """
    out = paths.user_path(comparison.out, "--out")
    check_out(comparison, out)
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = locks.acquire(out / LOCK, wait=0.1)
    except locks.LockTaken as error:
        raise OutputError(f"--out {out} is in use by another lorakin compare ({error})") from None
    except OSError as error:
        raise OutputError(f"--out {out} cannot be used: {error}") from error
    try:
        yield
    finally:
        lock.release()
        if is_new and {path.name for path in out.iterdir()} <= {LOCK}:
            # The comparison was refused: nothing of it stays.
            shutil.rmtree(out, ignore_errors=True)


def check_out(comparison: Comparison, out: Path) -> bool:
    """Returns whether `out` holds this comparison from an earlier run; False if it is new or empty.

    Raises:
        OutputError: `out` is a file, holds something else, or holds links.
        SettingError: it holds a comparison with other options.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file, expected a directory")
    _check_links(out)
    if not (out / SETTINGS).is_file():
        if out.is_dir() and any(path.name not in (DATA, LOCK, LOG) for path in out.iterdir()):
            raise OutputError(
                f"--out {out} is not empty and holds no comparison; choose another directory"
            )
        return False

    options = saved_in(out).options
    for name, value in comparison.as_dict().items():
        if options.get(name) != value:
            raise SettingError(
                f"--out {out} holds another comparison: its {name} is "
                f"{short_repr(options.get(name))}, not {value!r}; give the same options to resume "
                "it, or choose another --out"
            )
    return True


def _check_links(out: Path) -> None:
    """Refuses links: trials write and delete here, and the directory may come from a stranger."""
    entries = [
        path
        for folder in (out, out / TRIALS, out / DATA)
        if folder.is_dir()
        for path in folder.iterdir()
    ]
    if links := [path for path in entries if path.is_symlink()]:
        raise OutputError(
            f"--out {out}: {links[0]} is a link, and a comparison does not follow links; "
            "replace it by the file or directory that it points to"
        )


def saved_in(out: Path) -> Saved:
    """Reads comparison.yaml.

    Raises:
        SettingError: it is missing, or does not describe a comparison.
    """
    content = read_yaml(out / SETTINGS, "the comparison")
    try:
        options: dict[str, Any] = checked(dict[str, Any], content)
        parts, dtype = options.pop("parts", None), options.pop("dtype", None)
        saved: Saved = checked(Saved, {"options": options, "parts": parts, "dtype": dtype})
        return saved
    except SchemaError as error:
        raise SettingError(f"{out / SETTINGS} does not describe a comparison: {error}") from None


def save(out: Path, comparison: Comparison, parts: Parts, dtype: str) -> None:
    """Writes comparison.yaml."""
    content = {**comparison.as_dict(), "parts": dataclasses.asdict(parts), "dtype": dtype}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    atomic.write(out, {SETTINGS: text.encode()})
