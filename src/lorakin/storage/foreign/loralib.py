"""loralib (microsoft/LoRA), whose alpha is in no file.

| layer | A | B |
|---|---|---|
| Linear, Embedding | `.lora_A` (r, in); (r, vocabulary) | `.lora_B` (out, r); (dim, r) |
| MergedLinear | (g·r, in): g parts of the outputs, each with a pair of its own | (out, r) |
| Conv2d | (r·k, in·k) | (out·k, r·k), B·A taken as (out, in, k, k) |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakin.errors import some
from lorakin.family import Shape
from lorakin.storage.foreign.foreign_file import ForeignAdapter, ForeignFile
from lorakin.storage.peft.formats import DOWN, UP

KEY = r".*\.lora_[AB]"


def read(source: ForeignFile) -> ForeignAdapter:
    """Returns the adapter in a file of loralib's."""
    if biases := [key for key in source.tensors if key.rpartition(".")[2] == "bias"]:
        raise source.error(
            f"it trains biases ({some(biases)}), which this version does not read from loralib"
        )
    adapter = ForeignAdapter("loralib", {}, {}, [])
    for path, slots in source.split({"lora_A": DOWN, "lora_B": UP}).items():
        module, shape = source.module(path)
        A, B, rank = _pair(source, path, module, shape, slots[DOWN], slots[UP], adapter.notes)
        if shape.lookup and source.tied(path):
            adapter.notes.append(
                f"{path}: the head that is tied to it stays the base's, as in loralib's training"
            )
        adapter.slots[path] = source.checked(path, {DOWN: A, UP: B})
        adapter.scales[path] = source.scale(path, rank, ())
    return adapter


def _pair(
    source: ForeignFile,
    path: str,
    module: nn.Module,
    shape: Shape,
    A: Tensor,
    B: Tensor,
    notes: list[str],
) -> tuple[Tensor, Tensor, int]:
    """Returns a and B as one pair, and the rank that alpha is divided by."""
    if kernel := _square_kernel(module, A, B):
        rank = len(A) // kernel
        notes.append(
            f"{path}: loralib's convolution of rank {rank} is a pair of rank {len(A)} here"
        )
        return _diagonal([A] * kernel), B.reshape(shape.outputs, -1), rank
    parts = len(A) // max(B.shape[1], 1)
    if parts < 2 or len(A) != parts * B.shape[1]:
        return A, B, len(A)
    if len(B) < shape.outputs:
        raise source.error(
            f"{path} is a merged linear layer with {parts} of its parts adapted. The file does not "
            "say which (enable_lora), so it is not read"
        )
    if len(B) != shape.outputs or len(B) % parts:
        return A, B, len(A)
    rank = B.shape[1]
    notes.append(f"{path}: {parts} merged parts of rank {rank} are one pair of rank {len(A)} here")
    return A, _diagonal(B.chunk(parts)), rank


def _diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Returns the block diagonal matrix of these blocks."""
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


def _square_kernel(module: nn.Module, A: Tensor, B: Tensor) -> int | None:
    """Returns k if A (r·k, in·k), B (out·k, r·k) are loralib's for a convolution of kernel k × k.

    B·A is (out·k, in·k) and is read as (out, in, k, k). lorakin's matrix is (out, in·k·k): its row
    o is the rows o·k … o·k + k − 1 one after the other. So B has those rows side by side, and A is
    repeated k times down a block diagonal. None for other layers, and for k = 1.
    """
    if not isinstance(module, nn.Conv2d):
        return None
    k = module.kernel_size[0]
    wanted = module.out_channels * k, module.in_channels * k
    fits = module.kernel_size == (k, k) and (len(B), A.shape[1]) == wanted
    return k if k > 1 and fits and len(A) == B.shape[1] and len(A) % k == 0 else None
