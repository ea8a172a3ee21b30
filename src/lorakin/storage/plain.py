"""The document of any adapter as plain LoRA: B·A, and magnitudes if it has a gain."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lorakin.family import widened
from lorakin.family.dora import row_norms
from lorakin.inject import layer_kinds
from lorakin.inject.adapted import module_at
from lorakin.inject.layer_kinds import LayerKind, PeftGroupedConvolution
from lorakin.inject.placement import Placement, base_weight_of
from lorakin.inject.trainable_tokens import TokenRows
from lorakin.storage.document import Document, Slots
from lorakin.storage.peft.formats import DOWN, MAGNITUDE, UP, plain_method
from lorakin.storage.peft.scales import int_if_whole

NO_ROWS: tuple[Mapping[str, TokenRows], Mapping[str, Tensor]] = ({}, {})


def document_of_pairs(
    model: nn.Module,
    slots: Mapping[str, Slots],
    *,
    alphas: Mapping[str, float] | None = None,
    dropout: float = 0.0,
    whole_modules: Mapping[str, Mapping[str, Tensor]] | None = None,
    rows: tuple[Mapping[str, TokenRows], Mapping[str, Tensor]] = NO_ROWS,
    biases: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> Document:
    """Returns the document of plain LoRA with these pairs.

    Args:
        model: the base.
        slots: path → `A` (r, inputs), `B` (outputs, r) and perhaps `m` (outputs,). A module of
            rank 0 without `m` and without a bias changes nothing and is left out.
        alphas: path → alpha, for a scale of alpha/r; without it the scale is 1 everywhere.
        dropout: probability of zeroing an entry of the pairs' input in training.
        whole_modules: path → state of the modules that are trained whole.
        rows: path → which token rows are trained, and path → those rows.
        biases: path → a bias in place of the base's.
        buffers: name → a buffer of the base that training changed.
    """
    biases = biases or {}
    with_gain = any(MAGNITUDE in of_module for of_module in slots.values())
    written: dict[str, dict[str, Tensor]] = {}
    for path, given in slots.items():
        of_module, module = dict(given), module_at(model, path)
        if with_gain and MAGNITUDE not in of_module:
            # All modules have magnitudes, or none has. This one is the norm, so its gain is 1.
            scale = 1.0 if alphas is None else alphas[path] / max(1, len(of_module[DOWN]))
            wide = widened(of_module)
            of_module[MAGNITUDE] = row_norms(
                base_weight_of(module).to(wide[DOWN]), scale * wide[UP], wide[DOWN]
            )
        if not len(of_module[DOWN]) and (MAGNITUDE in of_module or path in biases):
            # PEFT cannot adapt a module with rank 0, so this one gets a pair of zeros.
            for slot in (DOWN, UP):
                of_module[slot] = of_module[slot].new_zeros([n or 1 for n in of_module[slot].shape])
        if len(of_module[DOWN]):
            written[path] = of_module

    ranks = {path: len(of_module[DOWN]) for path, of_module in written.items()}
    scaled = {path: ranks[path] if alphas is None else int_if_whole(alphas[path]) for path in ranks}
    methods = _methods(ranks, scaled, dropout, with_gain=with_gain)
    placement = dataclasses.replace(
        methods,
        whole_modules=tuple(whole_modules or ()),
        tokens=rows[0],
        biases=tuple(biases),
        peft_grouped=frozenset(
            p for p, of in written.items() if _is_across_groups(module_at(model, p), of)
        ),
    )
    return Document(placement, written, whole_modules or {}, rows[1], biases, buffers or {})


def _methods(
    ranks: Mapping[str, int], alphas: Mapping[str, float], dropout: float, *, with_gain: bool
) -> Placement:
    """Returns the placement of pairs of these ranks; the method has the highest rank and alpha."""
    rank, alpha = max(ranks.values(), default=1), max(alphas.values(), default=1)
    method = plain_method(rank, alpha, dropout, with_gain=with_gain)
    methods = {}
    for path in ranks:
        is_usual = (ranks[path], alphas[path]) == (rank, alpha)
        methods[path] = (
            method if is_usual else method.with_settings(rank=ranks[path], alpha=alphas[path])
        )
    return Placement(
        method,
        methods,
        rank_pattern={_exact_pattern(path): n for path, n in sorted(ranks.items()) if n != rank},
        alpha_pattern={_exact_pattern(path): n for path, n in sorted(alphas.items()) if n != alpha},
    )


def _exact_pattern(path: str) -> str:
    """Returns a pattern that matches this path and no other."""
    return f"^{re.escape(path)}"


def _is_across_groups(module: Any, slots: Slots) -> bool:
    """Returns whether a grouped convolution's pair reads the inputs of all groups."""
    inputs: int = slots[DOWN].shape[1]
    return layer_kinds.is_grouped(module) and inputs == PeftGroupedConvolution.shape(module).inputs


def as_plain(document: Document, model: nn.Module) -> Document:
    """Returns the document as plain LoRA, for a method that PEFT has no form for."""
    slots = {}
    for path, method in document.placement.methods.items():
        wide, module = widened(document.slots[path]), module_at(model, path)
        shape = kind_at(document, model, path).shape(module)
        pair = method.low_rank(wide, shape)
        slots[path] = {DOWN: pair.down, UP: pair.up}
        if MAGNITUDE in wide:
            slots[path][MAGNITUDE] = wide[MAGNITUDE]
        elif method.has_gain:
            weight = base_weight_of(module)
            gain = method.pair(wide, shape, weight).gain
            assert gain is not None
            slots[path][MAGNITUDE] = gain * row_norms(weight, pair.up, pair.down)
    placement = document.placement
    return document_of_pairs(
        model,
        slots,
        dropout=document.method.dropout,
        whole_modules=document.whole_modules,
        rows=(placement.tokens, document.rows),
        biases=document.biases,
    )


def kind_at(document: Document, model: nn.Module, path: str) -> type[LayerKind]:
    """Returns the kind of layer that the adapted module at `path` is."""
    if path in document.placement.peft_grouped:
        return PeftGroupedConvolution
    kind = layer_kinds.kind_of(module_at(model, path))
    assert kind is not None
    return kind
