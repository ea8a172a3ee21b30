"""Reads tensors that `torch.save` wrote, if the file is as large as they claim.

A pickle can name a tensor of 10¹² elements that are all one number in memory, or a hundred thousand
tensors that share memory, or unpack a few bytes into gigabytes. No adapter's file needs that.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError
from lorakin.storage import files
from lorakin.storage.schema import short_repr

SHARED = 4
"""How often the file's memory may be used: tied weights are several names for one memory."""


def tensors_of(file: Path, content: bytes | None = None) -> dict[str, Tensor]:
    """Returns the file's dense tensors by name, on the CPU, without running anything in it.

    Args:
        file: the path; also for messages.
        content: the file's content, if it was read already.

    Raises:
        AdapterError: the file has no tensors by name, is damaged, or claims more than it holds.
    """
    try:
        content = files.checked_file(file).read_bytes() if content is None else content
        _check_packing(file, content)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        is_intact = content is not None and zipfile.is_zipfile(io.BytesIO(content))
        reason = (
            "it holds other objects than tensors, and these are not unpickled"
            if is_intact
            else "it is damaged, or torch.save did not write it"
        )
        raise AdapterError(f"{file} cannot be read: {reason}") from None
    except AdapterError:
        raise
    # A damaged pickle makes torch fail in any way.
    except (Exception, RecursionError, MemoryError) as error:
        raise AdapterError(f"{file}: its tensors cannot be read ({str(error)[:200]})") from None
    if not isinstance(loaded, dict):
        raise AdapterError(f"{file} holds {type(loaded).__name__}, expected tensors by name")
    for key, tensor in loaded.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise AdapterError(
                f"{file}: {short_repr(key)} is {type(tensor).__name__}, expected a tensor under a "
                "name"
            )
        _check(key, tensor, file)
    if sum(tensor.nbytes for tensor in loaded.values()) > SHARED * len(content) + (1 << 20):
        raise AdapterError(
            f"{file}: its tensors share memory, and have many more elements than it holds"
        )
    return {key: tensor.detach().contiguous() for key, tensor in loaded.items()}


def _check_packing(file: Path, content: bytes) -> None:
    size = len(content)
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            entries = packed.infolist()
        if (
            any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            or sum(e.file_size for e in entries) > size
        ):
            raise AdapterError(
                f"{file}: its tensors cannot be read (it is compressed, as torch.save never does)"
            )


def is_plain(tensor: Tensor) -> bool:
    """Returns whether it is a dense tensor, of torch's own class."""
    is_dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return is_dense and not tensor.is_quantized and not tensor.is_nested


def _check(key: str, tensor: Tensor, file: Path) -> None:
    if not is_plain(tensor) or tensor.device.type != "cpu":
        raise AdapterError(
            f"{file}: tensor {short_repr(key)} is not a plain dense tensor ({tensor.layout}, "
            f"{tensor.device.type})"
        )
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        shape = tuple(tensor.shape)
        raise AdapterError(
            f"{file}: tensor {short_repr(key)} claims shape {shape}, for which the file is too "
            "short"
        )
