"""PEFT's words for what lorakin does: config fields, tensor names and shapes, both ways. docs/format.md tells it to a reader.

This is the one place outside `family/` that knows members by name, since the format does.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakin.errors import AdapterError, LorakinWarning, SettingError
from lorakin.family import LoRA, Member, member_named
from lorakin.surgery import layers
from lorakin.surgery.graft import Graft, Plan, plan_for
from lorakin.surgery.layers import ConvolutionLayer, EmbeddingLayer, Layer, TransposedLayer
from lorakin.surgery.targets import named_modules, resolve

PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Form:
    """How PEFT writes one type of adapter: setting → config field, tensor → name after the module's path."""

    peft_type: str
    member: type[Member]
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    slots: Mapping[str, str]
    lookup_slots: Mapping[str, str]


LORA = Form(
    peft_type="LORA",
    member=LoRA,
    fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"},
    defaults={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False},
    slots={"A": "lora_A.weight", "B": "lora_B.weight"},
    lookup_slots={"A": "lora_embedding_A", "B": "lora_embedding_B"},
)
FORMS = {LORA.peft_type: LORA}
FORM_OF = {LoRA.word: LORA}

# Fields that change what an adapter computes and that this version does not implement.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on B",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "corda_config": "CorDA",
    "kasa_config": "KaSA",
    "lora_ga_config": "LoRA-GA",
    "loftq_config": "LoftQ",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "layer replication",
    "ensure_weight_tying": "adapters shared by tied weights",
    "target_parameters": "adapters on raw parameters",
    "trainable_token_indices": "trainable tokens",
}
# Fields that say nothing about the function of a finished adapter, or that the reader takes from elsewhere.
SILENT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "exclude_modules", "megatron_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "rank_pattern", "alpha_pattern", "revision", "target_modules",
    "task_type", "bias", "init_lora_weights",
}  # fmt: skip
# Initialisations that leave the base weight as it was; the others (PiSSA, OLoRA, …) change it.
HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva", "lora_fa")


def to_config(graft: Graft) -> dict[str, Any]:
    """The adapter's `adapter_config.json`: PEFT's required fields and those that differ from its defaults."""
    form, plan = FORM_OF[graft.plan.member.word], graft.plan
    config: dict[str, Any] = {
        "peft_type": form.peft_type,
        "task_type": _task_type(graft.model),
        "base_model_name_or_path": getattr(graft.model, "name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": bool(plan.sites) and all(graft.site(path).layer is TransposedLayer for path in plan.sites),
        "inference_mode": True,
        "modules_to_save": sorted(plan.copies) or None,
        "target_modules": sorted(plan.sites),
    }
    for setting, field in form.fields.items():
        value = getattr(plan.member, setting)
        if field in ("r", "lora_alpha", "lora_dropout") or value != form.defaults[field]:
            config[field] = _whole(value)
    for field, pattern in (("rank_pattern", plan.rank_pattern), ("alpha_pattern", plan.alpha_pattern)):
        if pattern:
            config[field] = {key: _whole(value) for key, value in pattern.items()}
    return dict(sorted(config.items()))


def to_tensors(graft: Graft) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys and in PEFT's shapes, contiguous and on the CPU."""
    form = FORM_OF[graft.plan.member.word]
    tensors = {}
    for path in graft.plan.sites:
        site, module = graft.site(path), graft.model.get_submodule(path)
        for slot, tensor in site.tensors().items():
            tensors[f"{PREFIX}{path}.{_slots(form, site.layer)[slot]}"] = _to_file(tensor, slot, module)
    for path in graft.plan.copies:
        for key, tensor in graft.copy_of(path).state_dict().items():
            tensors[f"{PREFIX}{path}.{key}"] = tensor
    return {key: t.detach().to("cpu", copy=True).contiguous() for key, t in sorted(tensors.items())}


@dataclasses.dataclass(frozen=True)
class Contents:
    """An adapter read from files and matched with a model: the plan, and the tensors of each of its modules."""

    plan: Plan
    sites: Mapping[str, Mapping[str, Tensor]]
    copies: Mapping[str, Mapping[str, Tensor]]


def from_files(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], own: Mapping[str, Any], where: str
) -> Contents:
    """Match what stands in an adapter's files with `model`. `own` is lorakin's own file, or empty.

    Raises:
        AdapterError: anything missing, left over, misshapen, not finite, unsupported, or for another base.
    """
    form = check_config(config, where)
    member = member_of(form, config, own, where)
    modules = named_modules(model)
    sites, rest = _split(form, tensors)
    _check_paths(model, modules, sites, where)
    copies, rest = _split_copies(modules, config, rest)
    rest = _without_base_embeddings(modules, sites, rest, where)
    if rest:
        raise AdapterError(f"{where}: tensors that belong to nothing: {_some(rest)}; the file is damaged or of another kind")
    _check_targets(modules, config, sites, copies, where)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{where}: tensor {key} holds NaN or infinity")
    sites = {path: sites[path] for path in modules if path in sites}
    try:
        plan = plan_for(
            member,
            list(sites),
            list(copies),
            dict(config.get("rank_pattern") or {}),
            dict(config.get("alpha_pattern") or {}),
        )
    except SettingError as error:
        raise AdapterError(f"{where}: {error}") from None
    read = {path: _read_site(form, plan.sites[path], path, modules[path], slots, where) for path, slots in sites.items()}
    for path, state in copies.items():
        _check_copy(modules[path], path, state, where)
    return Contents(plan, read, copies)


def check_config(config: Mapping[str, Any], where: str) -> Form:
    """The form that `adapter_config.json` names, once nothing in it is beyond this version."""
    peft_type = config.get("peft_type")
    if peft_type not in FORMS:
        raise AdapterError(f"{where}: peft_type is {peft_type!r}; this version reads {', '.join(FORMS)}")
    for field, what in UNSUPPORTED.items():
        if config.get(field):
            raise AdapterError(f"{where}: it uses {what} ({field}={config[field]!r}), which this version does not implement")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{where}: it trains biases (bias={config['bias']!r}), which this version does not implement")
    init = config.get("init_lora_weights", True)
    if init not in HARMLESS_INITS:
        raise AdapterError(
            f"{where}: it was initialised with {init!r}, which changes the base weight, so on the plain base it is wrong; "
            "convert it with PEFT (path_initial_model_for_weight_conversion) first"
        )
    form = FORMS[peft_type]
    known = {*SILENT, *UNSUPPORTED, *form.fields.values()}
    if strange := sorted(key for key, value in config.items() if key not in known and value not in (None, False, {}, [])):
        warnings.warn(f"{where}: unknown settings ignored: {', '.join(strange)}", LorakinWarning, stacklevel=2)
    return form


def member_of(form: Form, config: Mapping[str, Any], own: Mapping[str, Any], where: str) -> Member:
    """The member with its settings: lorakin's own file, if there is one, under what PEFT's config says."""
    cls = form.member if not own else member_named(str(own.get("member")))
    settings = dict(own.get("settings") or {})
    settings |= {setting: config.get(field, form.defaults[field]) for setting, field in form.fields.items()}
    try:
        return cls(**settings)
    except (TypeError, SettingError) as error:
        raise AdapterError(f"{where}: settings that make no {cls.__name__}: {error}") from None


def pairs_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], own: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Path → (member there, its tensors as matrices), read from the files alone, without a model."""
    form = check_config(config, where)
    member = member_of(form, config, own, where)
    found = {}
    for path, slots in _split(form, tensors)[0].items():
        rank = resolve(dict(config.get("rank_pattern") or {}), path, getattr(member, "rank"))  # noqa: B009
        alpha = resolve(dict(config.get("alpha_pattern") or {}), path, getattr(member, "alpha"))  # noqa: B009
        there = dataclasses.replace(member, rank=rank, alpha=alpha)  # type: ignore[type-var]
        if missing := sorted(set(form.slots) - set(slots)):
            raise AdapterError(f"{where}: {path} lacks {', '.join(form.slots[slot] for slot in missing)}")
        found[path] = (there, {slot: tensor.flatten(1) for slot, tensor in slots.items()})
    return found


def _slots(form: Form, layer: type[Layer]) -> Mapping[str, str]:
    return form.lookup_slots if layer is EmbeddingLayer else form.slots


def _to_file(tensor: Tensor, slot: str, module: nn.Module) -> Tensor:
    """A convolution's A keeps its kernel in the file, and its B is a convolution of kernel 1."""
    if layers.kind_of(module) is not ConvolutionLayer:
        return tensor
    kernel = module.kernel_size
    assert isinstance(kernel, tuple)
    return ConvolutionLayer.layout(tensor, module) if slot == "A" else tensor.view(*tensor.shape, *(1 for _ in kernel))


def _split(form: Form, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by module path and slot, and those that are in no slot (under their path)."""
    sites: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    names = {name: slot for table in (form.slots, form.lookup_slots) for slot, name in table.items()}
    for key, tensor in tensors.items():
        bare = key.removeprefix(PREFIX)
        for name, slot in names.items():
            if bare.endswith("." + name):
                sites.setdefault(bare.removesuffix("." + name), {})[slot] = tensor
                break
        else:
            rest[bare] = tensor
    return sites, rest


def _check_paths(model: nn.Module, modules: Mapping[str, nn.Module], sites: Mapping[str, Any], where: str) -> None:
    unknown = [path for path in sites if path not in modules]
    if unknown:
        raise AdapterError(
            f"{where}: it is for another base model: it adapts {_some(unknown)}, "
            f"which this {type(model).__name__} does not have"
        )
    for path in sites:
        if reason := layers.refusal(modules[path], modules.get(path.rpartition(".")[0])):
            raise AdapterError(f"{where}: it adapts {path}, but that is {reason}")


def _split_copies(
    modules: Mapping[str, nn.Module], config: Mapping[str, Any], rest: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of the modules trained whole, by module path, and what is left."""
    names = config.get("modules_to_save") or []
    named = [path for path in modules if any(path == name or path.endswith("." + name) for name in names)]
    ends = tuple(names)  # PEFT takes every module whose path ends in the name, "norm" for "input_layernorm" too
    paths = [p for p in modules if p in named or (ends and p.endswith(ends) and any(key.startswith(p + ".") for key in rest))]
    copies: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    left = {}
    for key, tensor in rest.items():
        owner = next((path for path in paths if key.startswith(path + ".")), None)
        if owner is None:
            left[key] = tensor
        else:
            copies[owner][key.removeprefix(owner + ".")] = tensor
    return {path: state for path, state in copies.items() if state or any(True for _ in modules[path].parameters())}, left


def _without_base_embeddings(
    modules: Mapping[str, nn.Module], sites: Mapping[str, Any], rest: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """PEFT may add the base's own embedding and head; they must be the weights that this model has."""
    left = {}
    for key, tensor in rest.items():
        path = key.removesuffix(".weight").removesuffix(".base_layer")
        if path not in modules or not isinstance(modules[path], nn.Embedding | nn.Linear) or not key.endswith(".weight"):
            left[key] = tensor
            continue
        weight = modules[path].weight
        assert isinstance(weight, Tensor)
        here = weight.detach().cpu().float()
        if tensor.shape != here.shape or not torch.allclose(tensor.float(), here, rtol=1e-2, atol=1e-3):
            raise AdapterError(
                f"{where}: it is for another base model: {path} had another weight there, {tuple(tensor.shape)}, perhaps "
                "because its vocabulary was resized or trained; this model's is "
                f"{tuple(here.shape)}. Resize, and load that weight first"
            )
    return left


def _check_targets(
    modules: Mapping[str, nn.Module], config: Mapping[str, Any], sites: Mapping[str, Any], copies: Iterable[str], where: str
) -> None:
    """Every module that the config targets has its tensors, and the other way round."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    if not isinstance(targets, str):
        targets = frozenset(targets)
    wanted = {path for path, module in modules.items() if layers.kind_of(module) and _peft_match(targets, path, modules)}
    wanted = {path for path in wanted if not any(path == copy or path.startswith(copy + ".") for copy in copies)}
    if excluded := config.get("exclude_modules"):
        wanted = {path for path in wanted if not _peft_match(excluded, path)}
    chosen_layers = config.get("layers_to_transform")
    if chosen_layers is not None:
        numbers = {chosen_layers} if isinstance(chosen_layers, int) else set(chosen_layers)
        names = config.get("layers_pattern") or []  # the two rules are PEFT's own
        rules = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in ([names] if isinstance(names, str) else names)]
        rules = rules or [r".*?\.[^.]*\.(\d+)\."]
        found = {path: next((int(m[1]) for rule in rules if (m := re.match(rule, path))), None) for path in wanted}
        wanted = {path for path in wanted if found[path] in numbers}
    if missing := sorted(wanted - set(sites)):
        raise AdapterError(f"{where}: the config targets {_some(missing)}, but the file has no tensors for it")
    if extra := sorted(set(sites) - wanted):
        raise AdapterError(f"{where}: the file has tensors for {_some(extra)}, which the config does not target")


def _peft_match(targets: str | Collection[str], path: str, known: Collection[str] = ()) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds paths or their last parts.

    An entry that is itself the path of a module in `known` means that one alone.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    parts = path.split(".")
    entries = targets if isinstance(targets, frozenset) else frozenset(targets)
    return path in entries or any((end := ".".join(parts[n:])) in entries and end not in known for n in range(1, len(parts)))


def _read_site(
    form: Form, member: Member, path: str, module: nn.Module, slots: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    kind = layers.kind_of(module)
    assert kind is not None
    wanted = member.start(kind.shape(module), None, torch.device("meta"))
    if missing := [_slots(form, kind)[slot] for slot in wanted if slot not in slots]:
        raise AdapterError(f"{where}: {path} lacks {', '.join(missing)}")
    for slot, expected in wanted.items():
        shape = tuple(_to_file(expected, slot, module).shape)
        if tuple(slots[slot].shape) != shape:
            raise AdapterError(
                f"{where}: {path}.{_slots(form, kind)[slot]} has shape {tuple(slots[slot].shape)}, expected {shape} for rank "
                f"{getattr(member, 'rank', '?')} on this base; the config, the file and the base model do not fit together"
            )
        if not slots[slot].is_floating_point():
            raise AdapterError(f"{where}: {path}.{_slots(form, kind)[slot]} is {slots[slot].dtype}, expected a floating type")
    return {slot: slots[slot].flatten(1) for slot in wanted}


def _check_copy(module: nn.Module, path: str, state: Mapping[str, Tensor], where: str) -> None:
    wanted = {key: t for key, t in module.state_dict().items() if "lorakin" not in key.split(".")}
    if missing := sorted(set(wanted) - set(state)):
        raise AdapterError(f"{where}: the trained module {path} lacks {_some(missing)}")
    if extra := sorted(set(state) - set(wanted)):
        raise AdapterError(f"{where}: the trained module {path} has {_some(extra)}, which this model's does not")
    for key, tensor in wanted.items():
        if tensor.shape != state[key].shape:
            raise AdapterError(
                f"{where}: {path}.{key} has shape {tuple(state[key].shape)}, this model's has {tuple(tensor.shape)}"
            )


def _task_type(model: nn.Module) -> str | None:
    """PEFT's word for the model's task, by the ending that transformers gives its classes."""
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    return next((task for ending, task in endings.items() if type(model).__name__.endswith(ending)), None)


def _whole(value: Any) -> Any:
    """Whole floats as ints: other readers insist that alpha is one."""
    return int(value) if isinstance(value, float) and value.is_integer() and not math.isinf(value) and value != 0 else value


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
