"""Any adapter as plain LoRA: B·A with the scale in B, and magnitudes if it has a gain."""

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
from lorakin.storage.peft.forms import plain_method
from lorakin.storage.peft.scales import whole

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
    """The document of plain LoRA with these pairs.

    Args:
        model: the base.
        slots: path → `A` (r, inputs), `B` (outputs, r) and perhaps `m` (outputs,). A module of
            rank 0 without `m` and without a bias changes nothing and is left out.
        alphas: path → alpha, for a scale of alpha/r; without it the scale is 1 everywhere.
        dropout: probability of zeroing an entry of the pairs' input in training.
        whole_modules: path → state of the modules that are trained whole.
        rows: path → which rows of tokens are trained, and path → those rows.
        biases: path → a bias in place of the base's.
        buffers: name → a buffer of the base that training moved.
    """
    biases = biases or {}
    with_gain = any("m" in own for own in slots.values())
    found: dict[str, dict[str, Tensor]] = {}
    for path, own in slots.items():
        there, module = dict(own), module_at(model, path)
        if with_gain and "m" not in there:
            # Magnitudes are everywhere or nowhere. This one is the norm itself, so its gain is 1.
            scale = 1.0 if alphas is None else alphas[path] / max(1, len(there["A"]))
            wide = widened(there)
            there["m"] = row_norms(
                base_weight_of(module).to(wide["A"]), scale * wide["B"], wide["A"]
            )
        if not len(there["A"]) and ("m" in there or path in biases):
            # PEFT adapts no module with rank 0, so this one gets a pair of zeros.
            for slot in ("A", "B"):
                there[slot] = there[slot].new_zeros([n or 1 for n in there[slot].shape])
        if len(there["A"]):
            found[path] = there

    ranks = {path: len(own["A"]) for path, own in found.items()}
    scaled = {path: ranks[path] if alphas is None else whole(alphas[path]) for path in ranks}
    methods = _methods(ranks, scaled, dropout, with_gain=with_gain)
    placement = dataclasses.replace(
        methods,
        whole_modules=tuple(whole_modules or ()),
        tokens=rows[0],
        biases=tuple(biases),
        peft_grouped=frozenset(
            p for p, own in found.items() if _is_over_all(module_at(model, p), own)
        ),
    )
    return Document(placement, found, whole_modules or {}, rows[1], biases, buffers or {})


def _methods(
    ranks: Mapping[str, int], alphas: Mapping[str, float], dropout: float, *, with_gain: bool
) -> Placement:
    """The placement of pairs of these ranks; the highest rank and alpha are the method's."""
    rank, alpha = max(ranks.values(), default=1), max(alphas.values(), default=1)
    method = plain_method(rank, alpha, dropout, with_gain=with_gain)
    methods = {}
    for path in ranks:
        own = {"rank": ranks[path], "alpha": alphas[path]}
        methods[path] = (
            method if own == {"rank": rank, "alpha": alpha} else method.with_settings(**own)
        )
    return Placement(
        method,
        methods,
        rank_pattern={_exact_pattern(path): n for path, n in sorted(ranks.items()) if n != rank},
        alpha_pattern={_exact_pattern(path): n for path, n in sorted(alphas.items()) if n != alpha},
    )


def _exact_pattern(path: str) -> str:
    """A pattern that matches this path and no other."""
    return f"^{re.escape(path)}"


def _is_over_all(module: Any, slots: Slots) -> bool:
    """Whether a grouped convolution's pair reads the inputs of all groups."""
    inputs: int = slots["A"].shape[1]
    return layer_kinds.is_grouped(module) and inputs == PeftGroupedConvolution.shape(module).inputs


def as_plain(document: Document, model: nn.Module) -> Document:
    """The document as plain LoRA, for a method that PEFT has no form for."""
    slots = {}
    for path, method in document.placement.methods.items():
        wide, module = widened(document.slots[path]), module_at(model, path)
        shape = kind_at(document, model, path).shape(module)
        pair = method.low_rank(wide, shape)
        slots[path] = {"A": pair.down, "B": pair.up}
        if "m" in wide:
            slots[path]["m"] = wide["m"]
        elif method.has_gain:
            weight = base_weight_of(module)
            gain = method.pair(wide, shape, weight).gain
            assert gain is not None
            slots[path]["m"] = gain * row_norms(weight, pair.up, pair.down)
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
    """The kind of layer that the adapted module at `path` is."""
    if path in document.placement.peft_grouped:
        return PeftGroupedConvolution
    kind = layer_kinds.kind_of(module_at(model, path))
    assert kind is not None
    return kind
