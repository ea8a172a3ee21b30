"""Reads tensors that `torch.save` wrote, if the file holds what they claim.

A pickle can name a tensor of 10¹² numbers that are all one number, or a hundred thousand tensors
that are one memory, or unpack a few bytes into gigabytes. No adapter's file has such tensors.
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
from lorakin.storage.schema import shown

SHARED = 4
"""How often memory in the file may be used: tied weights are one memory under several names."""


def tensors_of(file: Path, content: bytes | None = None) -> dict[str, Tensor]:
    """Name -> dense tensor, on the CPU. `content` is the file's, where it has been read.

    Raises:
        AdapterError: the file has no tensors by name, is damaged, or claims more than it holds.
            Nothing in it was run.
    """
    try:
        content = files.regular(file).read_bytes() if content is None else content
        _check_packing(file, content)
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        whole = content is not None and zipfile.is_zipfile(io.BytesIO(content))
        what = (
            "it holds more than tensors, and is not run"
            if whole
            else "it is damaged, or none that torch.save wrote"
        )
        raise AdapterError(f"{file} cannot be read: {what}") from None
    except AdapterError:
        raise
    # A damaged pickle makes torch fail in any way.
    except (Exception, RecursionError, MemoryError) as error:
        raise AdapterError(f"{file}: its tensors cannot be read ({str(error)[:200]})") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{file} holds {type(found).__name__}, expected tensors by name")
    for key, tensor in found.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise AdapterError(
                f"{file}: {shown(key)} is {type(tensor).__name__}, expected a tensor under a name"
            )
        _check(key, tensor, file)
    if sum(tensor.nbytes for tensor in found.values()) > SHARED * len(content) + (1 << 20):
        raise AdapterError(
            f"{file}: its tensors share memory, and have many more numbers than it holds"
        )
    return {key: tensor.detach().contiguous() for key, tensor in found.items()}


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
    """Whether it is a dense tensor of numbers, of torch's own class."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_quantized and not tensor.is_nested


def _check(key: str, tensor: Tensor, file: Path) -> None:
    if not is_plain(tensor) or tensor.device.type != "cpu":
        raise AdapterError(
            f"{file}: tensor {shown(key)} is no plain dense tensor ({tensor.layout}, "
            f"{tensor.device.type})"
        )
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        shape = tuple(tensor.shape)
        raise AdapterError(
            f"{file}: tensor {shown(key)} claims shape {shape}, for which there are too few "
            "numbers in the file"
        )
