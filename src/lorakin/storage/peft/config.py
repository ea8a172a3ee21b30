"""Reads `adapter_config.json`: checks its fields, and makes the method that it names."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from lorakin.errors import AdapterError, LorakinWarning, SettingError
from lorakin.family import Member, Method, Modifier, Parametrisation
from lorakin.storage.lorakin_part import LorakinPart
from lorakin.storage.peft import starts, token_rows
from lorakin.storage.peft.fields import KINDS
from lorakin.storage.peft.forms import FLAGS, FORMS, LORA, SCHEDULE, TOKENS, Form, members_of
from lorakin.storage.schema import first_problem

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
"""Fields that change what an adapter computes, and that this version does not implement."""

SILENT = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "exclude_modules", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "rank_pattern", "alpha_pattern", "revision", "target_modules", "runtime_config", "task_type",
    "bias", "init_lora_weights", "init_weights", "target_parameters",
    *FLAGS, *starts.CONFIGS, *starts.TRAINING, token_rows.FIELD,
}  # fmt: skip
"""Fields that do not change what a finished adapter computes, or that are read elsewhere."""


def check_config(config: Mapping[str, Any], where: str) -> Form:
    """The form that a config names. Warns of fields that this version does not know.

    Raises:
        AdapterError: the form, or a field, is beyond this version; a field has no sensible value.
    """
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in FORMS:
        raise AdapterError(
            f"{where}: peft_type is {peft_type!r}; this version reads {', '.join(FORMS)}"
        )
    if reason := first_problem(config, KINDS):
        raise AdapterError(f"{where}: {reason}")
    form = FORMS[peft_type]
    _check_supported(form, config, where)
    known = {*SILENT, *UNSUPPORTED, *form.fields.values(), *form.ignored}
    strange = [
        key
        for key, value in config.items()
        if key not in known and value not in (None, False, {}, [])
    ]
    if strange:
        warnings.warn(
            f"{where}: unknown settings ignored: {', '.join(sorted(strange))}",
            LorakinWarning,
            stacklevel=2,
        )
    return form


def _check_supported(form: Form, config: Mapping[str, Any], where: str) -> None:
    for field, what in UNSUPPORTED.items():
        is_harmless = field == "ensure_weight_tying" and token_rows.says_all_of_ties(config)
        if config.get(field) and not is_harmless:
            raise AdapterError(
                f"{where}: it uses {what} ({field}={config[field]!r}), which this version does not "
                "implement"
            )
    for flag, member in FLAGS.items():
        if config.get(flag) and form is not LORA:
            raise AdapterError(
                f"{where}: it uses {member.__name__} on {form.peft_type}, which PEFT itself does "
                "not define"
            )
    if form is LORA and (reason := starts.refusal(config)):
        raise AdapterError(f"{where}: it {reason}")
    if said := starts.warning(config):
        warnings.warn(f"{where}: {said}", LorakinWarning, stacklevel=2)


def method_of(
    form: Form, config: Mapping[str, Any], part: LorakinPart | None, where: str
) -> Method:
    """The method with its settings.

    lorakin's own part names the members, if there is one. PEFT's config then has the last word on
    the settings of a form of its own, so that edits of it count.
    """
    said = {name: config.get(field, form.defaults[field]) for name, field in form.fields.items()}
    if form.alpha_without and said["alpha"] <= 0:
        said["alpha"] = said[form.alpha_without]
    try:
        method = (
            _method_of_peft(form, config, said) if part is None else _method_of_part(part, said)
        )
    except (TypeError, SettingError) as error:
        raise AdapterError(f"{where}: its settings do not make a valid method: {error}") from None
    _check_flags(form, config, method, where)
    return method


def _method_of_peft(form: Form, config: Mapping[str, Any], said: Mapping[str, Any]) -> Method:
    said = {**said, **dict.fromkeys(SCHEDULE)}
    return Method.of(
        [
            kind(**{name: value for name, value in said.items() if name in kind.setting_names()})
            for kind in members_of(form, config)
        ]
    )


def _method_of_part(part: LorakinPart, said: Mapping[str, Any]) -> Method:
    members: list[Member] = [entry.build() for entry in part.members]
    method = Method.of(members)
    said = {name: value for name, value in said.items() if name not in SCHEDULE}
    if part.tensors is not None or all(method.setting(n) == value for n, value in said.items()):
        return method
    pairs = [member for member in members if isinstance(member, Parametrisation)] or members
    return Method.of([_with(member, said) if member in pairs else member for member in members])


def _with(member: Member, said: Mapping[str, Any]) -> Member:
    """A member with the settings of its pair that the config says."""
    names = member.pair_settings if isinstance(member, Modifier) else member.setting_names()
    part = {name: value for name, value in said.items() if name in names}
    return dataclasses.replace(member, **part)  # type: ignore[type-var]


def _check_flags(form: Form, config: Mapping[str, Any], method: Method, where: str) -> None:
    """The method has a gain if and only if the config says so."""
    for flag in FLAGS:
        if form is not TOKENS and method.has_gain != bool(config.get(flag)):
            raise AdapterError(
                f"{where}: adapter_config.json says {flag}={config.get(flag, False)!r}, but "
                f"lorakin.json says that the method is {method.words}"
            )
