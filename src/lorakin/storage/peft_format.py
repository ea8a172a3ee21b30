"""PEFT's words for what lorakin does: config fields, tensor names and shapes, both ways. docs/format.md tells it to a reader.

This is the one place outside `family/` that knows members by name, since the format does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError, LorakinWarning, SettingError, TargetError, some
from lorakin.family import (
    AdaLoRA,
    DoRA,
    LoRA,
    Member,
    Method,
    Modifier,
    Pair,
    Parametrisation,
    Shape,
    Target,
    VeRA,
    all_finite,
    member_named,
    widened,
)
from lorakin.family.adalora import Triplets
from lorakin.family.dora import row_norms
from lorakin.family.low_rank import padded
from lorakin.family.slots import scale_of_ranks, sides_of_ranks
from lorakin.inject import layers
from lorakin.inject.adapted import module_at
from lorakin.inject.attachments import base_state
from lorakin.inject.biases import adapted_modules
from lorakin.inject.buffers import misfit_of_buffers
from lorakin.inject.layers import (
    ConvolutionLayer,
    EmbeddingLayer,
    ExpertLayer,
    Layer,
    LinearLayer,
    QuantisedLayer,
    TransposedLayer,
    UngroupedLayer,
)
from lorakin.inject.patterns import Values
from lorakin.inject.placement import Graft, Placement, own_weight, placement_for, target_of
from lorakin.inject.targets import named_modules
from lorakin.inject.tokens import TokenRows
from lorakin.storage import (
    attention,
    bias_format,
    expert_stacks,
    grouped,
    layer_weights,
    starts,
    token_rows,
)
from lorakin.storage.expert_stacks import PairScale, scale_of
from lorakin.storage.fields import misfit
from lorakin.storage.peft_targets import check_targets
from lorakin.storage.prefixes import other_prefix
from lorakin.storage.renamed import todays
from lorakin.storage.tasks import task_of

PREFIX = "base_model.model."
MOST_DRAWN = 1 << 28
"""Numbers of a shared pair that is drawn anew, a gibibyte, where the base is smaller."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How PEFT writes one type of adapter: setting → config field, tensor → name after the module's path."""

    peft_type: str
    members: tuple[type[Member], ...]
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    slots: Mapping[str, str]
    lookup_slots: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Tensors of the whole model → their key."""
    always: tuple[str, ...] = ()
    """Fields that are written even where they are PEFT's default."""
    layers: tuple[type[Layer], ...] = (LinearLayer, QuantisedLayer, TransposedLayer)
    ignored: tuple[str, ...] = ()
    """Fields that PEFT writes and does not read."""


LORA = Form(
    peft_type="LORA",
    members=(LoRA,),
    fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"},
    defaults={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False},
    slots={"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
    lookup_slots={"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"},
    always=("r", "lora_alpha", "lora_dropout"),
    layers=(
        LinearLayer,
        QuantisedLayer,
        TransposedLayer,
        EmbeddingLayer,
        ConvolutionLayer,
        ExpertLayer,
    ),
)
VERA = Form(
    peft_type="VERA",
    members=(VeRA,),
    fields={
        "rank": "r", "dropout": "vera_dropout", "seed": "projection_prng_key", "d_init": "d_initial",
        "save_projection": "save_projection",
    },
    defaults={"r": 256, "vera_dropout": 0.0, "projection_prng_key": 0, "d_initial": 0.1, "save_projection": True},
    slots={"d": "vera_lambda_d", "b": "vera_lambda_b"},
    shared={"A": "base_model.vera_A", "B": "base_model.vera_B"},
    always=("r", "projection_prng_key", "save_projection"),
)  # fmt: skip
ADALORA = Form(
    peft_type="ADALORA",
    members=(AdaLoRA,),
    fields={
        "initial_rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_rank": "target_r",
        "total_steps": "total_step", "start": "tinit", "finish": "tfinal", "interval": "deltaT", "beta1": "beta1",
        "beta2": "beta2", "orthogonality": "orth_reg_weight",
    },
    defaults={
        "init_r": 12, "lora_alpha": 8, "lora_dropout": 0.0, "target_r": 8, "total_step": None, "tinit": 0, "tfinal": 0,
        "deltaT": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5,
    },
    slots={"P": "lora_B", "E": "lora_E", "Q": "lora_A"},
    ignored=("r",),
    always=("init_r", "lora_alpha", "lora_dropout", "target_r", "total_step", "tinit", "tfinal", "orth_reg_weight"),
)  # fmt: skip
TOKENS = Form(
    peft_type=token_rows.ALONE,
    members=(LoRA,),
    fields={},
    defaults={},
    slots={},
    ignored=(token_rows.IDS,),
)
"""Rows of tokens and nothing else."""
FORMS = {form.peft_type: form for form in (LORA, VERA, ADALORA, TOKENS)}
FORM_OF = {LoRA.word: LORA, VeRA.word: VERA, Triplets.word: ADALORA}
"""By the word of the parametrisation."""
PLANNED = ("total_steps", "start", "finish", "interval")
UNPLANNED = {"total_step": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
"""For an adapter that was never trained: PEFT reads no schedule without a length."""

# Fields that change what an adapter computes and that this version does not implement.
UNSUPPORTED = {
    "lora_bias": "a bias on B",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "layer replication",
    "ensure_weight_tying": "adapters shared by tied weights",
}
# Fields that say nothing about the function of a finished adapter, or that the reader takes from elsewhere.
SILENT = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", *starts.CONFIGS, *starts.TRAINING,
    "layers_pattern", "layers_to_transform", "exclude_modules", "megatron_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "rank_pattern", "alpha_pattern", "revision", "target_modules",
    "runtime_config", "task_type", "bias", "init_lora_weights", "use_dora", "init_weights", "target_parameters",
    token_rows.FIELD,
}  # fmt: skip


def native_form(graft: Graft) -> Form | None:
    """PEFT's form that holds exactly this adapter's tensors; None if it has none, and the pair is written in its stead."""
    form, sites = (
        FORM_OF.get(graft.placement.method.parametrisation.word),
        [graft.branch(path) for path in graft.placement.methods],
    )
    patterns = bool(graft.placement.rank_pattern or graft.placement.alpha_pattern)
    if (
        graft.placement.tokens
        and not (sites or graft.placement.copies)
        and token_rows.stand_alone(graft.placement.tokens)
    ):
        return TOKENS
    if graft.placement.tokens and form is VERA:  # of which PEFT trains no tokens
        return None
    if (
        form is None
        or (patterns and form is not LORA)
        or any(site.layer not in form.layers for site in sites)
    ):
        return None
    if not all(
        form_of.are_whole(graft.model, graft.placement.methods)
        for form_of in (expert_stacks, attention)
    ):
        return None
    if any(layers.is_grouped(module_at(graft.model, path)) for path in graft.placement.methods):
        return None
    slots = {*form.slots, *form.shared}
    return (
        form
        if all(slots.issuperset(graft.tensors_at(path)) for path in graft.placement.methods)
        else None
    )


def to_files(graft: Graft, form: Form | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The adapter's `adapter_config.json` and its tensors under PEFT's keys and in PEFT's shapes, contiguous, on the CPU.

    `form` is its native form. The config has PEFT's required fields and those that differ from its defaults.
    """
    copies = {path: graft.copy_of(path).state_dict() for path in graft.placement.copies}
    rows = token_rows.written(graft)
    if form is None:
        dropout, biases = graft.placement.method.dropout, graft.biases()
        return pairs_to_files(
            graft.model, _as_pairs(graft), copies=copies, dropout=dropout, rows=rows, biases=biases
        )
    config, tensors = _as_they_are(graft, form)
    scales = {path: scale_of(method) for path, method in graft.placement.methods.items()}
    word = bias_format.word(
        graft.model, graft.placement.biases, graft.placement.methods, form.peft_type
    )
    config |= {"peft_type": form.peft_type, "bias": word}
    return _finished(graft.model, config, tensors, scales, copies, rows, graft.biases())


def pairs_to_files(
    model: nn.Module,
    sites: Mapping[str, Mapping[str, Tensor]],
    *,
    alphas: Mapping[str, float] | None = None,
    copies: Mapping[str, Mapping[str, Tensor]] | None = None,
    dropout: float = 0.0,
    rows: tuple[Mapping[str, TokenRows], Mapping[str, Tensor]] = ({}, {}),
    biases: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The files of plain LoRA: of the pairs B·A, or with an `m` DoRA, in the modules of `model` at these paths.

    Args:
        model: the base.
        sites: path → `A` (r, inputs), `B` (outputs, r) and perhaps `m` (outputs,), as matrices. A module whose rank is 0,
            without an `m` and a bias, changes nothing and is left out.
        alphas: path → alpha, the scale being alpha/r; without it alpha is r everywhere and the scale 1.
        copies: path → state of the modules trained whole.
        dropout: of the branch's input.
        rows: of tokens, by path: which, and what is in them.
        biases: path → a bias in place of the base's.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    gained = any("m" in slots for slots in sites.values())
    for path, slots in sites.items():
        there, module = dict(slots), module_at(model, path)
        if (
            gained and "m" not in there
        ):  # PEFT has magnitudes everywhere or nowhere: here the one that is no gain
            scale = 1.0 if alphas is None else alphas[path] / max(1, len(there["A"]))
            wide = widened(there)
            there["m"] = row_norms(own_weight(module).to(wide["A"]), scale * wide["B"], wide["A"])
        if not there["A"].shape[0] and (
            "m" in there or path in (biases or ())
        ):  # these alone: PEFT needs a rank
            there["A"], there["B"] = (
                there[s].new_zeros([n or 1 for n in there[s].shape]) for s in ("A", "B")
            )
        if layers.is_grouped(module) and there["A"].shape[0]:
            scale = 1.0 if alphas is None else alphas[path] / len(there["A"])
            there = grouped.written(module, {**there, "B": scale * there["B"]})
            alphas = alphas if alphas is None else {**alphas, path: float(len(there["A"]))}
        if there["A"].shape[0]:
            ranks[path] = there["A"].shape[0]
            kind = layers.kind_of(module)
            assert kind is not None
            tensors |= {
                f"{PREFIX}{path}.{_slots(LORA, kind)[slot]}": _to_file(t, slot, module)
                for slot, t in there.items()
            }
    alphas = {path: ranks[path] if alphas is None else alphas[path] for path in ranks}
    config: dict[str, Any] = {
        "peft_type": LORA.peft_type,
        "target_modules": sorted(ranks),
        "lora_dropout": dropout,
    }
    config["bias"] = bias_format.word(model, biases or (), sites, LORA.peft_type)
    for field, values, pattern in (
        ("r", ranks, "rank_pattern"),
        ("lora_alpha", alphas, "alpha_pattern"),
    ):
        most = max(values.values(), default=1)
        config[field] = _whole(most)
        if own := {
            f"^{re.escape(path)}": _whole(value)
            for path, value in sorted(values.items())
            if value != most
        }:
            config[pattern] = own
    scales = {path: PairScale(ranks[path], alphas[path], False) for path in ranks}
    config |= {"use_dora": True} if gained else {}
    return _finished(model, config, tensors, scales, copies or {}, rows, biases or {})


def _finished(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    scales: Mapping[str, PairScale],
    copies: Mapping[str, Mapping[str, Tensor]],
    rows: tuple[Mapping[str, TokenRows], Mapping[str, Tensor]],
    biases: Mapping[str, Tensor],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """With what every config says, and the modules trained whole; all in order. `scales` are those of the pairs, by path."""
    named, copies = sorted(copies), {**copies, **wrapped_too(model, copies, scales)}
    heading = {
        "task_type": task_of(model, copies),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "fan_in_fan_out": bool(scales)
        and all(layers.kind_of(module_at(model, p)) is TransposedLayer for p in scales),
        "inference_mode": True,
        "modules_to_save": named or None,
    }
    own, tensors, scales = attention.written(model, config, tensors, scales, PREFIX)
    own, tensors = expert_stacks.stacked(model, own, tensors, scales, PREFIX)
    fields, of_tokens = token_rows.to_files(
        model, *rows, alone=config["peft_type"] == TOKENS.peft_type
    )
    tensors |= {f"{PREFIX}{key}": tensor for key, tensor in of_tokens.items()}
    tensors |= {
        f"{PREFIX}{path}.{key}": tensor
        for path, state in copies.items()
        for key, tensor in state.items()
    }
    tensors |= bias_format.keyed(biases, tensors, PREFIX)
    written = {
        key: t.detach().to("cpu", copy=True).contiguous() for key, t in sorted(tensors.items())
    }
    return dict(sorted((heading | own | fields).items())), written


def wrapped_too(
    model: nn.Module, whole: Collection[str], adapted: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """What PEFT takes for trained whole although it is not: path → the base's own state.

    PEFT goes by the ends of names: with "classifier" it wraps "pre_classifier" too, and fails on a
    file that does not hold it.
    """
    ends = tuple(whole)
    inside = tuple(f"{path}." for path in whole)
    found = {}
    for path, module in named_modules(model).items() if ends else ():
        taken = path in whole or path in adapted or path.startswith(inside)
        if path.endswith(ends) and not taken and any(True for _ in module.parameters()):
            found[path] = base_state(module)
    return found


def _as_they_are(graft: Graft, form: Form) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config fields and tensors of an adapter whose tensors are PEFT's."""
    placement = graft.placement
    config: dict[str, Any] = {"target_modules": sorted(placement.methods)}
    for setting, field in form.fields.items():
        value = graft.method.setting(setting)
        value = UNPLANNED.get(field) if value is None else value
        if field in form.always or value != form.defaults[field]:
            config[field] = _whole(value)
    for field, pattern in (
        ("rank_pattern", placement.rank_pattern),
        ("alpha_pattern", placement.alpha_pattern),
    ):
        if pattern:
            config[field] = {key: _whole(value) for key, value in pattern.items()}
    tensors: dict[str, Tensor] = {}
    kept = {}
    for path in placement.methods:
        site, module = graft.branch(path), module_at(graft.model, path)
        for slot, tensor in graft.tensors_at(path).items():
            if slot not in form.shared:
                tensors[f"{PREFIX}{path}.{_slots(form, site.layer)[slot]}"] = _to_file(
                    tensor, slot, module
                )
            elif placement.method.setting("save_projection"):
                tensors[form.shared[slot]] = tensor
            if slot == "m":
                config["use_dora"] = True
        if form is ADALORA:
            rank, initial = len(site.tensors()["E"]), placement.method.setting("initial_rank")
            kept[f"{path}.lora_E"] = [True] * rank + [False] * (initial - rank)
    if not all(all(row) for row in kept.values()):
        config["rank_pattern"] = kept
    return config, tensors


def _as_pairs(graft: Graft) -> dict[str, dict[str, Tensor]]:
    """For `pairs_to_files`, an adapter that PEFT has no form for: its pair with the scale in it, a gain as DoRA's m."""
    sites = {}
    for path in graft.placement.methods:
        site = graft.branch(path)
        wide = widened(graft.tensors_at(path))
        pair = site.method.low_rank(wide, site.shape)
        sites[path] = {"A": pair.down, "B": pair.up}
        if "m" in wide:
            sites[path]["m"] = wide["m"]
        elif site.method.gains:
            gain = site.method.pair(wide, site.shape, graft.base_weight(path)).gain
            assert gain is not None
            sites[path]["m"] = gain * row_norms(graft.base_weight(path), pair.up, pair.down)
    return sites


@dataclasses.dataclass(frozen=True)
class Contents:
    """An adapter read from files and matched with a model: the placement, the tensors of each of its modules, training's state."""

    placement: Placement
    sites: Mapping[str, Mapping[str, Tensor]]
    copies: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any] | None = None
    buffers: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """Of the base, by name, as training left them."""
    rows: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """Of tokens, by path."""
    biases: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """In place of the base's, by the module's path."""

    def masters(self) -> dict[str, dict[str, Tensor]]:
        """The tensors in float32 at least, for training, in memory of their own; those that were one object still are."""
        own = _masters(t for slots in self.sites.values() for t in slots.values())
        return {
            path: {slot: own[id(t)] for slot, t in slots.items()}
            for path, slots in self.sites.items()
        }

    def bias_masters(self) -> dict[str, Tensor]:
        """The same of the biases."""
        own = _masters(self.biases.values())
        return {path: own[id(t)] for path, t in self.biases.items()}


def _masters(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Copies in float32 at least, by the identity of what they are of."""
    return {id(t): t.to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in tensors}


@dataclasses.dataclass(frozen=True)
class Own:
    """lorakin's own part of an adapter's files: the members, their tensors if PEFT has no form for them, training's state."""

    members: tuple[tuple[str, Mapping[str, Any]], ...]
    tensors: Mapping[str, Mapping[str, Tensor]] | None
    patterns: Sequence[Mapping[str, Any]]
    state: Mapping[str, Any] | None
    projection: str | None
    base: Mapping[str, Any] | None
    buffers: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    whole: Collection[str] | None = None
    """Paths of the modules trained whole, where PEFT's file holds more of them."""


def from_files(
    model: nn.Module,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    own: Own | None,
    where: str,
) -> Contents:
    """Match what stands in an adapter's files with `model`. `own` is lorakin's own part, or None.

    Raises:
        AdapterError: anything missing, left over, misshapen, not finite, unsupported, or for another base.
    """
    form, method, config, tensors = _read(model, config, tensors, own, where)
    sites, rest = _split(form, tensors)
    paths = {*sites, *(own.tensors if own is not None and own.tensors is not None else ())}
    modules = named_modules(model, {path.rpartition(".")[0] for path in paths})
    former: Mapping[str, list[str]] = {}
    if own is None or own.tensors is None:
        now = todays(model, modules, config, sites, rest, where)
        config, sites, rest, former = now.config, now.sites, now.rest, now.former
    _check_paths(model, modules, sites, where)
    over_all = frozenset[str]()
    if form is LORA:
        config, sites, over_all = grouped.read(modules, sites, config, where)
    copies, rest = _split_copies(modules, config, bias_format.without_doubles(config, rest))
    if own is not None and own.whole is not None:
        copies = {path: state for path, state in copies.items() if path in own.whole}
    biases, rest = bias_format.split(
        modules, config, adapted_modules(model, sites), copies, rest, where
    )
    rest = _without_head_biases(modules, rest, where)
    vocabulary = {} if own is None or own.base is None else own.base["weights"]
    tokens = token_rows.taken(model, modules, config, rest, sites, copies, vocabulary, where)
    if rest := dict(tokens.rest):
        raise AdapterError(
            f"{where}: tensors that belong to nothing: {some(rest)}; the file is damaged or of another kind"
        )
    if form is not TOKENS:
        check_targets(modules, config, sites, copies, former, where)
    _check_numbers(tensors, where)
    for path, state in copies.items():
        _check_copy(modules[path], path, state, _vocabulary_of(model), where)
    if own is not None and own.tensors is not None:
        _check_paths(model, modules, own.tensors, where)
        if absent := sorted(set(sites) - set(own.tensors)):
            raise AdapterError(f"{where}: lorakin.json lacks the tensors of {some(absent)}")
        read: dict[str, dict[str, Tensor]] = {
            path: dict(own.tensors[path]) for path in modules if path in own.tensors
        }
    else:
        read = {path: _matrices(sites[path]) for path in modules if path in sites}
    try:
        placement = placement_for(method, list(read), list(copies), *_patterns(form, config, own))
        kept = _with_ranks_kept(placement, config, read)
        placement = dataclasses.replace(
            kept, tokens=tokens.tokens, ungrouped=over_all, biases=tuple(biases)
        )
    except (SettingError, TargetError) as error:
        raise AdapterError(f"{where}: {error}") from None
    targets = {path: target_of(modules[path]) for path in read}
    targets |= {
        path: Target(UngroupedLayer.shape(modules[path]), targets[path].weight)
        for path in over_all & targets.keys()
    }
    expected = _expected(
        placement, targets
    )  # whose order of tensors a fresh adapter has, and its optimizer's state
    if own is None or own.tensors is None:
        _check_shapes(form, placement, expected, modules, sites, where)
        _add_shared(form, config, own, method, targets, tensors, read, where)
    read = {
        path: dict(sorted(slots.items(), key=lambda item: _position(item[0], expected[path])))
        for path, slots in read.items()
    }
    _check_slots(placement, expected, targets, read, where)
    if own is not None and own.tensors is not None:
        _check_pairs(placement, modules, targets, read, config, sites, where)
    shared = placement.method.share(read, targets, placement.methods)
    for path, slots in shared.items():
        for slot, tensor in slots.items():
            if tensor is not read[path][slot] and not torch.equal(tensor, read[path][slot]):
                raise AdapterError(
                    f"{where}: {path} shares its pair with others, but its {slot} in the file is another"
                )
    if own is None:
        return Contents(placement, shared, copies, rows=tokens.values, biases=biases)
    if reason := misfit_of_buffers(model, own.buffers):
        raise AdapterError(f"{where}: {reason}")
    return Contents(placement, shared, copies, own.state, own.buffers, tokens.values, biases)


def _read(
    model: nn.Module | None,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    own: Own | None,
    where: str,
) -> tuple[Form, Method, Mapping[str, Any], Mapping[str, Tensor]]:
    """The form, the method, and the files with a pair for each module that has one."""
    form = check_config(config, where)
    tensors = starts.without_training(tensors)
    known = None if own is None or own.tensors is None else own.tensors.keys()
    if (
        config.get(expert_stacks.FIELD) and own is not None
    ):  # of a dropout there PEFT would hear nothing
        dropouts = [settings.get("dropout") for _, settings in own.members]
        config = {**config, "lora_dropout": next((dropout for dropout in dropouts if dropout), 0.0)}
    if model is not None:
        config, tensors = layer_weights.as_layers(config, tensors, model, where, PREFIX)
    config, tensors = attention.read(config, tensors, known, own is not None, where, PREFIX)
    config, tensors = expert_stacks.unstacked(
        config, tensors, model, known, where, PREFIX, ours=own is not None
    )
    return form, method_of(form, config, own, where), config, tensors


def _position(slot: str, expected: Mapping[str, Tensor]) -> int:
    return list(expected).index(slot) if slot in expected else len(expected)


def _check_pairs(
    placement: Placement,
    modules: Mapping[str, nn.Module],
    targets: Mapping[str, Target],
    read: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    sites: Mapping[str, Mapping[str, Tensor]],
    where: str,
) -> None:
    """The pairs of our own tensors are those that PEFT's files hold, so that both say the same function."""
    ranks, alphas = (Values(config.get(field) or {}) for field in ("rank_pattern", "alpha_pattern"))
    for path, slots in read.items():
        pair = placement.methods[path].low_rank(widened(slots), targets[path].shape)
        theirs = sites.get(path, {})
        if not theirs and not pair.down.shape[0]:
            continue
        if "A" in theirs:  # all of a stack, or of an attention, have one rank there
            pair = padded(pair, max(len(theirs["A"]), pair.down.shape[0]))
        rank = ranks.of(path, config.get("r", LORA.defaults["r"])) or 1
        alpha = alphas.of(path, config.get("lora_alpha", LORA.defaults["lora_alpha"])) or 0
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        same = (
            {"A", "B"} <= theirs.keys()
            and theirs["B"].flatten(1).shape[1] == rank
            and abs(scale - 1) < 1e-6
        )
        if same and layers.is_grouped(modules[path]):
            ours, theirs = (
                pair.up @ pair.down,
                {slot: t.flatten(1).to(pair.up) for slot, t in theirs.items()},
            )
            same = torch.allclose(ours, theirs["B"] @ theirs["A"], rtol=1e-3, atol=1e-6)
        elif same and pair.down.shape[0]:
            same = all(
                ours.shape == t.flatten(1).shape
                and torch.allclose(ours, t.flatten(1).to(ours), rtol=1e-3, atol=1e-6)
                for ours, t in ((pair.up, theirs["B"]), (pair.down, theirs["A"]))
            )
        if not same:
            raise AdapterError(
                f"{where}: for {path} adapter_config.json and adapter_model.safetensors say another change than lorakin.json; "
                "one of them was edited. Without lorakin.json the adapter is what PEFT's files say"
            )


def _with_ranks_kept(
    placement: Placement, config: Mapping[str, Any], read: Mapping[str, Mapping[str, Tensor]]
) -> Placement:
    """The placement with the rank of each module whose ranks were pruned."""
    slots = placement.method.parametrisation.slots
    scales = scale_of_ranks(slots)
    if scales is None or not sides_of_ranks(slots):
        return placement
    sites = {}
    for path, method in placement.methods.items():
        rows = (config.get("rank_pattern") or {}).get(f"{path}.lora_E")
        kept = (
            len(read[path][scales])
            if rows is None and scales in read[path] and read[path][scales].dim()
            else sum(rows or ())
        )
        sites[path] = (
            method if kept == method.parametrisation.initial_rank else method.at(kept=kept)  # type: ignore[attr-defined]
        )
    return dataclasses.replace(placement, methods=sites)


def _matrices(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's tensors in the file as matrices, a magnitude as a vector, without the dimensions of a kernel."""
    return {
        slot: t.reshape(-1) if slot == "m" else t.flatten(1) if t.dim() > 2 else t
        for slot, t in slots.items()
    }


def _patterns(
    form: Form, config: Mapping[str, Any], own: Own | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ranks and alphas of single modules: in our own part where that holds the tensors, else in PEFT's if it reads them."""
    if own is not None and own.tensors is not None:
        return dict(own.patterns[0]), dict(own.patterns[1])
    return (
        (dict(config.get("rank_pattern") or {}), dict(config.get("alpha_pattern") or {}))
        if form is LORA
        else ({}, {})
    )


def _add_shared(
    form: Form,
    config: Mapping[str, Any],
    own: Own | None,
    method: Method,
    targets: Mapping[str, Target],
    tensors: Mapping[str, Tensor],
    read: dict[str, dict[str, Tensor]],
    where: str,
) -> None:
    """Give every module the tensors of the whole model: those in the file, or drawn again."""
    if not form.shared or not targets:
        return
    found = {slot: tensors[key] for slot, key in form.shared.items() if key in tensors}
    found = found if len(found) == len(form.shared) else {}
    saved = config.get("save_projection", form.defaults["save_projection"])
    inputs, outputs = (
        max(getattr(target.shape, side) for target in targets.values())
        for side in ("inputs", "outputs")
    )
    if found:
        rank = method.setting("rank")
        for slot, wanted in (("A", (rank, inputs)), ("B", (outputs, rank))):
            have = tuple(found[slot].shape)
            if (
                len(have) != 2
                or any(h < w for h, w in zip(have, wanted, strict=True))
                or rank not in have
            ):
                raise AdapterError(
                    f"{where}: {form.shared[slot]} has shape {have}, expected {wanted} for rank {rank} on this base"
                )
        if (
            own is not None
            and own.projection is not None
            and own.projection != projection_checksum(found)
        ):
            raise AdapterError(
                f"{where}: its shared pair is not the one that it was trained with: lorakin.json has another checksum"
            )
    elif saved:
        raise AdapterError(
            f"{where}: it lacks {' and '.join(form.shared.values())}, which the config says it holds"
        )
    if not saved:
        rank, there = (
            method.setting("rank"),
            sum(math.prod(target.shape[:2]) for target in targets.values()),
        )
        if (numbers := rank * (inputs + outputs)) > max(MOST_DRAWN, there):
            raise AdapterError(
                f"{where}: its shared pair of rank {rank:,} is not in the file, and drawn again it would have {numbers:,} "
                f"numbers, where the weights that it adapts have {there:,}; the file is damaged or hostile"
            )
        pair, base = method.parametrisation, next(iter(targets.values())).weight
        fresh = next(
            iter(
                pair.start_all(
                    targets, dict.fromkeys(targets, pair), None, torch.device("cpu")
                ).values()
            )
        )
        drawn, seed = {slot: fresh[slot] for slot in form.shared}, method.setting("seed")
        if not found:
            found = drawn
            if (
                own is not None
                and own.projection is not None
                and own.projection != projection_checksum(found)
            ):
                raise AdapterError(
                    f"{where}: the projections drawn again from seed {seed} are not those it was trained with; the base's "
                    f"dtype ({base.dtype}) or the adapted modules must be others. Load the base in the dtype of training"
                )
        elif not all(torch.equal(drawn[slot], found[slot].float()) for slot in drawn):
            warnings.warn(
                f"{where}: the projections in the file are not those of its seed {seed}; the file's are used",
                LorakinWarning,
                stacklevel=2,
            )
    for slots in read.values():
        slots |= found


def shared_tensors(graft: Graft, form: Form) -> dict[str, Tensor]:
    """The tensors of the whole model that the adapter has, whose form this is, by slot."""
    if not form.shared or not graft.placement.methods:
        return {}
    tensors = graft.tensors_at(next(iter(graft.placement.methods)))
    return {slot: tensors[slot] for slot in form.shared}


def projection_checksum(shared: Mapping[str, Tensor]) -> str:
    """SHA-256 of the shared tensors' float32 values."""
    plain = {slot: t.detach().cpu().to(torch.float32).contiguous() for slot, t in shared.items()}
    return hashlib.sha256(safetensors.torch.save(plain)).hexdigest()


def _check_shapes(
    form: Form,
    placement: Placement,
    expected: Mapping[str, Mapping[str, Tensor]],
    modules: Mapping[str, nn.Module],
    sites: Mapping[str, Mapping[str, Tensor]],
    where: str,
) -> None:
    """Each module has PEFT's tensors in PEFT's shapes, for the rank that the config says."""
    for path, fresh in expected.items():
        kind = layers.kind_of(modules[path])
        assert kind is not None
        names, rank = (
            _slots(form, kind),
            getattr(placement.methods[path].parametrisation, "rank", "?"),
        )
        wanted = {slot: t for slot, t in fresh.items() if slot in names}
        if missing := [names[slot] for slot in wanted if slot not in sites[path]]:
            raise AdapterError(f"{where}: {path} lacks {', '.join(missing)}")
        if extra := [names[slot] for slot in sites[path] if slot not in wanted]:
            raise AdapterError(
                f"{where}: {path} has {', '.join(extra)}, which its config does not announce"
            )
        for slot, tensor in wanted.items():
            shape, have = (
                tuple(_to_file(tensor, slot, modules[path]).shape),
                tuple(sites[path][slot].shape),
            )
            if have != shape and not (slot == "E" and have == (*shape, 1)):
                raise AdapterError(
                    f"{where}: {path}.{names[slot]} has shape {have}, expected {shape} for rank {rank} on this base; the "
                    "config, the file and the base model do not fit together"
                )
            if not sites[path][slot].is_floating_point():
                raise AdapterError(
                    f"{where}: {path}.{names[slot]} is {sites[path][slot].dtype}, expected a floating type"
                )


def _check_slots(
    placement: Placement,
    expected: Mapping[str, Mapping[str, Tensor]],
    targets: Mapping[str, Target],
    read: Mapping[str, Mapping[str, Tensor]],
    where: str,
) -> None:
    """The tensors of each module, which are finite, are those of the method, and fit together."""
    for path, fresh in expected.items():
        shape, method, slots = targets[path].shape, placement.methods[path], read[path]
        known = method.slots_at(path, shape).keys()
        if missing := [slot for slot, t in fresh.items() if slot not in slots and t.numel()]:
            raise AdapterError(f"{where}: {path} lacks {', '.join(missing)} of {method.words}")
        if extra := sorted(set(slots) - set(known)):
            raise AdapterError(
                f"{where}: {path} has {', '.join(extra)}, which {method.words} does not have"
            )
        try:
            pair = method.low_rank({slot: t.to("meta") for slot, t in slots.items()}, shape)
            fits = (pair.up.shape[0], pair.down.shape[1]) == shape[:2] and pair.up.shape[
                1
            ] == pair.down.shape[0]
        except (RuntimeError, IndexError):
            fits = False
        wrong = [s for s, t in slots.items() if not t.is_floating_point()]
        wrong += [
            s
            for s, t in fresh.items()
            if s in slots and t.dim() == 1 and t.numel() and slots[s].shape != t.shape
        ]
        if wrong or not fits:
            raise AdapterError(
                f"{where}: the tensors of {path} do not fit {method.words} on this base ({', '.join(wrong or slots)})"
            )


def _expected(placement: Placement, targets: Mapping[str, Target]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a fresh adapter of this placement, without values."""
    meta = torch.device("meta")
    bare = {
        path: Target(
            target.shape, torch.empty(target.weight.shape, dtype=target.weight.dtype, device=meta)
        )
        for path, target in targets.items()
    }
    return placement.method.start(bare, placement.methods, None, meta)


def check_config(config: Mapping[str, Any], where: str) -> Form:
    """The form that `adapter_config.json` names, once nothing in it is beyond this version."""
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in FORMS:
        raise AdapterError(
            f"{where}: peft_type is {peft_type!r}; this version reads {', '.join(FORMS)}"
        )
    if reason := misfit(config):
        raise AdapterError(f"{where}: {reason}")
    for field, what in UNSUPPORTED.items():
        if config.get(field) and not (
            field == "ensure_weight_tying" and token_rows.says_all_of_ties(config)
        ):
            raise AdapterError(
                f"{where}: it uses {what} ({field}={config[field]!r}), which this version does not implement"
            )
    bias_format.check(config, where)
    if config.get("use_dora") and config["peft_type"] != LORA.peft_type:
        raise AdapterError(
            f"{where}: it uses DoRA on {config['peft_type']}, which PEFT itself does not define"
        )
    form = FORMS[peft_type]
    if form is LORA and (reason := starts.refusal(config)):
        raise AdapterError(f"{where}: it {reason}")
    known = {*SILENT, *UNSUPPORTED, *form.fields.values(), *form.ignored}
    if strange := sorted(
        key
        for key, value in config.items()
        if key not in known and value not in (None, False, {}, [])
    ):
        warnings.warn(
            f"{where}: unknown settings ignored: {', '.join(strange)}", LorakinWarning, stacklevel=2
        )
    return form


def method_of(form: Form, config: Mapping[str, Any], own: Own | None, where: str) -> Method:
    """The method with its settings: lorakin's own part, if there is one, under what PEFT's config says of a form of its own."""
    said = {
        setting: config.get(field, form.defaults[field]) for setting, field in form.fields.items()
    }
    if form is ADALORA and said["alpha"] <= 0:
        said["alpha"] = said["initial_rank"]  # PEFT's rule
    try:
        if own is None:
            kinds: tuple[type[Member], ...] = (
                (*form.members, DoRA) if config.get("use_dora") else form.members
            )
            said |= dict.fromkeys(PLANNED, None)  # the run that the schedule was for is over
            return Method.of(
                [
                    kind(**{k: v for k, v in said.items() if k in kind.setting_names()})
                    for kind in kinds
                ]
            )
        members = [member_named(word)(**settings) for word, settings in own.members]
        method = Method.of(members)
        if own.tensors is None and any(
            method.setting(name) != value for name, value in said.items() if name not in PLANNED
        ):
            pair = [member for member in members if isinstance(member, Parametrisation)] or members
            members = [
                dataclasses.replace(m, **{k: v for k, v in said.items() if k in _pair_fields(m)})  # type: ignore[type-var]
                if m in pair
                else m
                for m in members
            ]
            method = Method.of(members)
    except (TypeError, SettingError) as error:
        raise AdapterError(
            f"{where}: settings that make no method of this version: {error}"
        ) from None
    gained = any("gain" in member.decides for member in method.members)
    if form is not TOKENS and gained != bool(config.get("use_dora")):
        flag = f"use_dora={config.get('use_dora', False)!r}"
        raise AdapterError(
            f"{where}: its adapter_config.json says {flag}, but lorakin.json says that it is {method.words}"
        )
    return method


def _pair_fields(member: Member) -> frozenset[str]:
    """The settings of the pair among a member's."""
    return (
        frozenset(member.pair_settings) if isinstance(member, Modifier) else member.setting_names()
    )


def pairs_of(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], own: Own | None, where: str
) -> tuple[Placement, dict[str, Pair]]:
    """The placement, and path → the pair there without its gain, read from the files alone, without a model.

    Where only the base says how many inputs a module has (VERA), the widest's are taken; where a shared pair would have to
    be drawn with the base at hand, there are no pairs.
    """
    form, method, config, tensors = _read(None, config, tensors, own, where)
    if own is None or own.tensors is None:
        _check_alone(form, config, tensors, where)
    if own is not None and own.tensors is not None:
        sites: Mapping[str, Mapping[str, Tensor]] = own.tensors
        needed = set[str]()
    else:
        shared = {slot: tensors[key] for slot, key in form.shared.items() if key in tensors}
        sites = {
            path: grouped.spread(_matrices(slots)) | shared
            for path, slots in _split(form, tensors)[0].items()
        }
        needed = set(form.slots) - {"m"}
    try:
        placement = _with_ranks_kept(
            placement_for(method, list(sites), (), *_patterns(form, config, own)), config, sites
        )
    except (SettingError, TargetError) as error:
        raise AdapterError(f"{where}: {error}") from None
    for path, slots in sites.items():
        if missing := sorted(form.slots[slot] for slot in needed if slot not in slots):
            raise AdapterError(f"{where}: {path} lacks {', '.join(missing)}")
    if form.shared and not any(form.shared.keys() <= slots.keys() for slots in sites.values()):
        return placement, {}
    return placement, {
        path: _pair_of_files(placement.methods[path], slots, f"{where}: {path}")
        for path, slots in sites.items()
    }


def _check_numbers(tensors: Mapping[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() < 2):
            raise AdapterError(
                f"{where}: tensor {key} is {tensor.dtype}; expected float32, float16, bfloat16 or float64"
            )
        if not all_finite(tensor):
            raise AdapterError(f"{where}: tensor {key} holds NaN or infinity")


def _check_alone(
    form: Form, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> None:
    """See what of an adapter's tensors can be seen without its base: numbers, none that belongs to nothing, at least one.

    Whether the rest fits, only the base says.
    """
    _check_numbers(tensors, where)
    if not tensors:
        raise AdapterError(f"{where}: it holds no tensors, so it is no adapter")
    sites, rest = _split(form, tensors)
    for path, slots in sites.items():
        for slot, tensor in slots.items():
            if not tensor.is_floating_point():
                raise AdapterError(
                    f"{where}: {slot} of {path} is {tensor.dtype}; expected float32, float16 or bfloat16"
                )
    mentioned = config.get("modules_to_save") or ()
    belongs = (".weight", ".bias", token_rows.DELTA)  # of modules trained whole, of biases, of rows
    stray = [
        key
        for key in rest
        if not key.endswith(belongs) and not any(f".{name}." in f".{key}." for name in mentioned)
    ]
    if stray:
        raise AdapterError(
            f"{where}: tensors that belong to nothing: {some(stray)}; the file is damaged or of another kind"
        )


def _pair_of_files(method: Method, slots: Mapping[str, Tensor], where: str) -> Pair:
    shapes = ", ".join(f"{slot} {tuple(tensor.shape)}" for slot, tensor in slots.items())
    misfit = AdapterError(f"{where}: its tensors make no pair of {method.words}: {shapes}")
    try:
        outputs = (
            len(slots["b"]) if "b" in slots else len(slots["B"] if "B" in slots else slots["P"])
        )
        inputs = (slots["A"] if "A" in slots else slots["Q"]).shape[1]
        pair = method.low_rank(
            {slot: t.float() for slot, t in slots.items()}, Shape(outputs, inputs)
        )
    except (RuntimeError, IndexError, KeyError, TypeError):
        raise misfit from None
    if pair.up.dim() != 2 or pair.down.dim() != 2 or pair.up.shape[1] != pair.down.shape[0]:
        raise misfit
    return pair


def _slots(form: Form, layer: type[Layer]) -> Mapping[str, str]:
    return form.lookup_slots if layer is EmbeddingLayer else form.slots


def _to_file(tensor: Tensor, slot: str, module: nn.Module) -> Tensor:
    """A convolution's A keeps its kernel in the file, its B is a convolution of kernel 1, its m lies along the channels."""
    if layers.kind_of(module) is not ConvolutionLayer:
        return tensor
    kernel = module.kernel_size
    assert isinstance(kernel, tuple)
    ones = (1,) * len(kernel)
    if slot == "m":
        return tensor.view(1, -1, *ones)
    return (
        tensor.view(len(tensor), -1, *kernel) if slot == "A" else tensor.view(*tensor.shape, *ones)
    )


def _split(
    form: Form, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by module path and slot, and those that are in no slot (under their path)."""
    sites: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    names = {
        name: slot for table in (form.slots, form.lookup_slots) for slot, name in table.items()
    }
    for key, tensor in tensors.items():
        if key in form.shared.values():
            continue
        bare = key.removeprefix(PREFIX)
        for name, slot in names.items():
            if bare.endswith("." + name):
                sites.setdefault(bare.removesuffix("." + name), {})[slot] = tensor
                break
        else:
            rest[bare] = tensor
    return sites, rest


def _check_paths(
    model: nn.Module, modules: Mapping[str, nn.Module], sites: Mapping[str, Any], where: str
) -> None:
    unknown = [path for path in sites if path not in modules]
    if unknown and len(unknown) == len(sites) and (other := other_prefix(sites, modules)):
        here, there = type(model).__name__, unknown[0]
        raise AdapterError(
            f"{where}: this {here} has the modules that it adapts, but under other names: {there} in the file is "
            f"{other.here + there.removeprefix(other.there)} here. {other.advice}"
        )
    if unknown:
        raise AdapterError(
            f"{where}: it is for another base model: it adapts {some(unknown)}, which this {type(model).__name__} does not have"
        )
    for path in sites:
        if reason := layers.refusal(modules[path]):
            raise AdapterError(f"{where}: it adapts {path}, but that is {reason}")


def _split_copies(
    modules: Mapping[str, nn.Module], config: Mapping[str, Any], rest: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of the modules trained whole, by module path, and what is left."""
    names = config.get("modules_to_save") or []
    named = [
        path for path in modules if any(path == name or path.endswith("." + name) for name in names)
    ]
    ends = tuple(
        names
    )  # PEFT takes every module whose path ends in the name, "norm" for "input_layernorm" too
    paths = [
        p
        for p in modules
        if p in named
        or (ends and p.endswith(ends) and any(key.startswith(p + ".") for key in rest))
    ]
    copies: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    left = {}
    for key, tensor in rest.items():
        owner = next((path for path in paths if key.startswith(path + ".")), None)
        if owner is None:
            left[key] = tensor
        else:
            copies[owner][key.removeprefix(owner + ".")] = tensor
    return {
        path: state
        for path, state in copies.items()
        if state or any(True for _ in modules[path].parameters())
    }, left


def _without_head_biases(
    modules: Mapping[str, nn.Module], rest: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """PEFT may add the base's own head with its bias; that must be the one that this model has."""
    left = {}
    for key, tensor in rest.items():
        owner, _, name = key.rpartition(".")
        module = modules.get(owner.removesuffix(".base_layer"))
        own = (
            module._parameters.get("bias")
            if isinstance(module, nn.Linear) and name == "bias"
            else None
        )
        if own is None or f"{owner}.weight" not in rest:
            left[key] = tensor
            continue
        here = own.detach() if own.is_meta else own.detach().cpu().float()
        same = here.is_meta or (
            tensor.shape == here.shape
            and torch.allclose(tensor.float(), here, rtol=1e-2, atol=1e-3)
        )
        if not same:
            raise AdapterError(
                f"{where}: it is for another base model: {owner.removesuffix('.base_layer')} had another bias there. Load "
                "that bias into the base before the adapter"
            )
    return left


def _resize(there: Tensor, here: Tensor, vocabulary: int | None) -> str:
    """What to do first if the two are of vocabularies of different sizes; nothing if not. `vocabulary`: the model's."""
    of_tokens = (
        there.dim() == here.dim() > 0
        and there.shape[1:] == here.shape[1:]
        and len(here) == vocabulary != len(there)
    )
    more = f": its vocabulary was resized. Resize this one to {len(there)} first: model.resize_token_embeddings({len(there)})"
    return more if of_tokens else ""


def _vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens the model knows, by its config."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return getattr(text() if callable(text) else config, "vocab_size", None)


def _check_copy(
    module: nn.Module, path: str, state: Mapping[str, Tensor], vocabulary: int | None, where: str
) -> None:
    wanted = base_state(module)
    if missing := sorted(set(wanted) - set(state)):
        raise AdapterError(f"{where}: the trained module {path} lacks {some(missing)}")
    if extra := sorted(set(state) - set(wanted)):
        raise AdapterError(
            f"{where}: the trained module {path} has {some(extra)}, which this model's does not"
        )
    for key, tensor in wanted.items():
        if tensor.shape != state[key].shape:
            raise AdapterError(
                f"{where}: {path}.{key} has shape {tuple(state[key].shape)}, this model's has {tuple(tensor.shape)}"
                + _resize(state[key], tensor, vocabulary)
            )
        if tensor.is_floating_point() != state[key].is_floating_point():
            raise AdapterError(
                f"{where}: {path}.{key} is {state[key].dtype}, this model's is {tensor.dtype}"
            )


def _whole(value: Any) -> Any:
    """Whole floats as ints: other readers insist that alpha is one."""
    return (
        int(value)
        if isinstance(value, float) and value.is_integer() and not math.isinf(value) and value != 0
        else value
    )
