"""Plain LoRA from any adapter, and adapters from the files of other libraries."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakin.adapter import Adapter
from lorakin.errors import LorakinWarning, SettingError, StateError, some
from lorakin.family import Pair, all_finite
from lorakin.family.low_rank import Fit, nearest, padded, root_of_samples
from lorakin.family.settings import is_finite_number
from lorakin.inject.calibration_inputs import input_samples
from lorakin.inject.layer_kinds import LinearLayer, TransposedLayer
from lorakin.inject.model_registry import root_of
from lorakin.inject.trainable_tokens import TokenRows
from lorakin.loading import insert_document
from lorakin.storage.document import Document
from lorakin.storage.foreign.read import read_foreign
from lorakin.storage.match import match
from lorakin.storage.peft.formats import DOWN, UP
from lorakin.storage.plain import document_of_pairs

RANK_MULTIPLE = 8
"""Portable ranks are multiples of this, which suits the kernels that serve them."""
VLLM_LARGEST_RANK = 512
"""The largest rank that vLLM serves."""


class FittedLoRA(NamedTuple):
    """A plain LoRA adapter, and by module path how near it comes to what it stands for."""

    adapter: Adapter
    fits: dict[str, Fit]


class Converted(NamedTuple):
    """An adapter from another library's file, that library's name, and notes for the user."""

    adapter: Adapter
    format: str
    notes: list[str]


@torch.no_grad()
def as_lora(
    adapter: Adapter,
    name: str = "plain",
    *,
    rank: int | None = None,
    error: float | None = None,
    batches: Sequence[Mapping[str, Any]] = (),
    portable: bool = False,
) -> FittedLoRA:
    """Puts a plain LoRA that computes the same as `adapter` into the model, and activates it.

    It is exact for every method without a gain. For a method with a gain (DoRA) it is the nearest
    plain LoRA within a rank or an error, which you name. Both can also make an exact one smaller.

    >>> import lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> adapter = lk.adapt(model, lk.VeRA(rank=4), "0")
    >>> plain = lk.as_lora(adapter)
    >>> plain.adapter.placement.method.words, plain.fits["0"].error
    ('lora', 0.0)

    Args:
        adapter: any adapter that is in a model.
        name: the new adapter's name.
        rank: the largest rank that a module gets.
        error: each module gets the smallest rank whose relative error is at most this:
            ‖ΔW − B·A‖ / ‖ΔW‖, or with `batches` the same of the module's outputs.
        batches: keyword arguments of the model. With them, what counts for linear modules is their
            outputs on this data, not the weights alone.
        portable: one rank, a multiple of 8, for all modules, and scale 1: the form that vLLM and
            llama.cpp read.

    Raises:
        SettingError: a gain and neither rank nor error, or something that the portable form cannot
            hold.
        StateError: the adapter is merged, or has moved the base weights in place.
    """
    if adapter.is_merged:
        raise StateError(f"adapter {adapter.name!r} is merged; unmerge it before converting it")
    check_limits(rank, error)
    if not all(isinstance(batch, Mapping) for batch in batches) or isinstance(batches, Mapping):
        raise SettingError(
            "batches must be a list of mappings that the model takes as keywords, not "
            f"{str(batches)[:80]}"
        )

    samples = _InputSamples(input_samples(adapter, list(batches)) if batches else {})
    pairs, fits = {}, {}
    for path in adapter.placement.methods:
        change = adapter.tensors.saved_change(path)
        if change.gain is not None and rank is None and error is None:
            raise SettingError(
                f"adapter {adapter.name!r} ({adapter.placement.method.words}) scales the base "
                f"weight by a gain ({path}, …), which no plain LoRA does exactly. Name a rank or "
                "an error for the nearest one (rank=…, error=…; --rank, --error), or merge it into "
                "the model, which is exact"
            )
        check_finite(change, adapter, path)
        weight = adapter.tensors.base_weight(path)
        pairs[path], fit = nearest(
            change, weight, rank=rank, error=error, root=samples.root_at(path)
        )
        fits[path] = samples.with_output_error(fit, change, pairs[path], weight, path)
    warn_if_missed(fits, error)

    tokens = adapter.placement.tokens
    plain = insert_pairs(
        adapter.model,
        name,
        _portable(adapter, pairs) if portable else pairs,
        {
            path: adapter.tensors.copy_of(path).state_dict()
            for path in adapter.placement.whole_modules
        },
        (tokens, {path: adapter.tensors.rows_at(path) for path in tokens}),
        adapter.tensors.moved_buffers(),
        adapter.tensors.biases(),
    )
    return FittedLoRA(plain, fits)


def insert_pairs(
    model: nn.Module,
    name: str,
    pairs: Mapping[str, Pair],
    whole_modules: Mapping[str, Mapping[str, Tensor]] | None = None,
    rows: tuple[Mapping[str, TokenRows], Mapping[str, Tensor]] = ({}, {}),
    buffers: Mapping[str, Tensor] | None = None,
    biases: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Puts plain LoRA of scale 1 with these pairs into the model, and activates it.

    Args:
        pairs: path → the pair of a module.
        whole_modules: path → state of a module that is trained whole.
        rows: by path, which tokens' rows are trained, and their values.
        buffers: name → a buffer of the base that training moved.
        biases: path → a bias in place of the base's.
    """
    slots = {path: {DOWN: pair.down, UP: pair.up} for path, pair in pairs.items()}
    document = document_of_pairs(
        model, slots, whole_modules=whole_modules, rows=rows, biases=biases, buffers=buffers
    )
    return _insert_copied(model, name, document, f"adapter {name!r}")


def _insert_copied(model: nn.Module, name: str, document: Document, where: str) -> Adapter:
    """Puts an adapter that was made in memory into the model; its tensors are copied."""
    return insert_document(model, name, match(document, model, where).copied())


def convert(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    alpha: float | None = None,
) -> Converted:
    """Reads an adapter from another library's file, puts it into `model`, and activates it.

    It reads loralib, torchtune, mlx-lm and LyCORIS/kohya; `lorakin.storage.foreign` has the names
    and the scale of each.

    >>> import tempfile, torch, lorakin as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> tensors = {"0.lora_A": torch.ones(1, 3), "0.lora_B": torch.ones(2, 1)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(tensors, f"{folder}/lora.pt")
    ...     converted = lk.convert(model, f"{folder}/lora.pt", alpha=1)
    >>> converted.format, model[0].lorakin.default.A
    ('loralib', Parameter containing:
    tensor([[1., 1., 1.]]))

    Args:
        model: the adapter's base.
        path: the file, or the directory that holds it.
        name: the adapter's name here.
        alpha: for files that do not say it; the scale is alpha/rank.

    Raises:
        AdapterError: an unknown format, left-over or misshapen tensors, or an adapter that is no
            low-rank pair.
        SettingError: the file needs an alpha.
    """
    model = root_of(model)
    foreign = read_foreign(Path(path), model, alpha=alpha)

    slots, alphas = {}, {}
    for module, pair in foreign.slots.items():
        scale, rank = foreign.scales[module], len(pair[DOWN])
        # PEFT's alpha must be positive, so any other scale goes into B.
        if scale > 0:
            slots[module], alphas[module] = pair, scale * rank
        else:
            slots[module], alphas[module] = pair | {UP: scale * pair[UP]}, float(rank)

    document = document_of_pairs(model, slots, alphas=alphas)
    adapter = _insert_copied(model, name, document, str(path))
    return Converted(adapter, foreign.format, foreign.notes)


class _InputSamples:
    """Samples of the modules' inputs by path, and roots of E[x·xᵀ] over them.

    Modules that share a sample come one after the other; the root is computed once for them.
    """

    def __init__(self, samples: Mapping[str, Tensor]) -> None:
        self.samples = samples
        self._last_sample: Tensor | None = None
        self._last_root: Tensor | None = None

    def root_at(self, path: str) -> Tensor | None:
        """Returns the root (inputs, inputs) for one module; None without samples of it."""
        if path not in self.samples:
            return None
        sample = self.samples[path]
        if self._last_sample is not sample:
            self._last_sample, self._last_root = sample, root_of_samples(sample)
        return self._last_root

    def with_output_error(
        self, fit: Fit, change: Pair, nearest_pair: Pair, weight: Tensor, path: str
    ) -> Fit:
        """Returns the fit with the outputs' error on the samples, without the root's ridge."""
        if path not in self.samples:
            return fit
        x = self.samples[path].to(weight.device)
        wide = weight.to(x.dtype)
        up, down = nearest_pair.up.to(x.dtype), nearest_pair.down.to(x.dtype)
        true_output = x @ (change.applied_to(wide) - wide).T
        difference = true_output - (x @ down.T) @ up.T
        error = difference.norm() / true_output.norm().clamp(min=1e-30)
        return dataclasses.replace(fit, output_error=float(error))


def check_limits(rank: int | None, error: float | None) -> None:
    """Raises `SettingError` unless the rank and the error are limits or None."""
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise SettingError(f"rank must be a whole number of at least 1, not {rank!r}")
    if error is not None and not (is_finite_number(error) and 0 < error < 1):
        raise SettingError(f"error must be between 0 and 1, not {error!r}")


def check_finite(change: Pair, adapter: Adapter, path: str) -> None:
    """Raises `StateError` if a change holds NaN or infinity."""
    if not all(all_finite(part) for part in change if part is not None):
        raise StateError(
            f"adapter {adapter.name!r} holds NaN or infinity in {path}; it cannot be converted"
        )


def warn_if_missed(fits: Mapping[str, Fit], error: float | None) -> None:
    """Warns if the rank, which wins over the error, leaves more error than was asked for."""
    above = [path for path, fit in fits.items() if error is not None and fit.limited_error > error]
    if above:
        worst = max(above, key=lambda path: fits[path].limited_error)
        warnings.warn(
            f"the rank leaves a relative error above {error:g} in {len(above)} of {len(fits)} "
            f"modules ({fits[worst].limited_error:.2g} in {worst}); allow a larger rank, or leave "
            "it open",
            LorakinWarning,
            stacklevel=4,
        )


def _portable(adapter: Adapter, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """Returns the pairs padded to one rank.

    Raises:
        SettingError: the adapter has something that other programs do not read.
    """
    placement = adapter.placement
    not_linear = [
        path
        for path in pairs
        if adapter.tensors.branch(path).kind not in (LinearLayer, TransposedLayer)
    ]
    for what, paths in {
        "modules that are trained whole": placement.whole_modules,
        "trained token rows": placement.tokens,
        "biases": placement.biases,
        "a pair on a layer that is not linear": not_linear,
    }.items():
        if paths:
            raise SettingError(
                f"the portable form cannot hold {what} ({some(paths)}); merge instead"
            )

    largest = max((pair.down.shape[0] for pair in pairs.values()), default=1)
    rank = math.ceil(max(largest, 1) / RANK_MULTIPLE) * RANK_MULTIPLE
    if rank > VLLM_LARGEST_RANK:
        warnings.warn(
            f"the portable form has rank {rank}, and vLLM serves {VLLM_LARGEST_RANK} at most; "
            "rank=… (--rank) makes it smaller",
            LorakinWarning,
            stacklevel=3,
        )
    return {path: padded(pair, rank) for path, pair in pairs.items()}
