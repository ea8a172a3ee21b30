"""A merged model on disk: a plain transformers directory that needs lorakin no more."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from lorakin.adapter import adapters
from lorakin.errors import OutputError
from lorakin.training.models import load_with_adapter, quiet_loading


def merge(model: str, adapter: str, out: str, dtype: str = "base") -> int:
    """Fold `adapter` into `model` and write model and tokenizer to the new directory `out`; returns the bytes written.

    Raises:
        LorakinError: the model or adapter cannot be loaded, or `out` is not empty or cannot be written. `out` then does
            not exist, or is as it was.
    """
    target = Path(out).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(f"--out {out} is not empty; choose another directory")
    loaded = load_with_adapter(model, adapter, dtype)
    for one in adapters(loaded.model).values():
        one.merge(permanent=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise OutputError(f"cannot write to --out {out}: {error.strerror}") from error
    try:
        with quiet_loading():
            loaded.model.save_pretrained(partial)
            loaded.tokenizer.save_pretrained(partial)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        partial.chmod(0o755)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except Exception as error:  # safetensors reports a full disk as an error of its own
        raise OutputError(f"cannot write the merged model to {out}: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(partial)
    return size
