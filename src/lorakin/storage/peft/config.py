"""Reads `adapter_config.json`: checks its fields and returns the method that it names."""

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
from lorakin.storage.peft.formats import (
    FLAGS,
    FORMATS_BY_TYPE,
    LORA,
    SCHEDULE,
    TOKENS_ONLY,
    PeftFormat,
    members_of,
)
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
"""Fields that change what an adapter computes and that this version does not implement."""

NO_WARNING = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "exclude_modules", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "rank_pattern", "alpha_pattern", "revision", "target_modules", "runtime_config", "task_type",
    "bias", "init_lora_weights", "init_weights", "target_parameters",
    *FLAGS, *starts.CONFIGS, *starts.TRAINING_ONLY, token_rows.FIELD,
}  # fmt: skip
"""Fields without a warning: they do not change a finished adapter, or are read elsewhere."""


def check_config(config: Mapping[str, Any], where: str) -> PeftFormat:
    """Returns the format that a config names, and warns of unknown fields.

    Raises:
        AdapterError: this version does not read the format or a field; a field has an invalid
            value.
    """
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in FORMATS_BY_TYPE:
        raise AdapterError(
            f"{where}: peft_type is {peft_type!r}; this version reads {', '.join(FORMATS_BY_TYPE)}"
        )
    if reason := first_problem(config, KINDS):
        raise AdapterError(f"{where}: {reason}")
    peft_format = FORMATS_BY_TYPE[peft_type]
    _check_supported(peft_format, config, where)
    known = {*NO_WARNING, *UNSUPPORTED, *peft_format.fields.values(), *peft_format.ignored}
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
    return peft_format


def _check_supported(peft_format: PeftFormat, config: Mapping[str, Any], where: str) -> None:
    for field, what in UNSUPPORTED.items():
        is_harmless = field == "ensure_weight_tying" and token_rows.says_all_of_ties(config)
        if config.get(field) and not is_harmless:
            raise AdapterError(
                f"{where}: it uses {what} ({field}={config[field]!r}), which this version does not "
                "implement"
            )
    for flag, member in FLAGS.items():
        if config.get(flag) and peft_format is not LORA:
            raise AdapterError(
                f"{where}: it uses {member.__name__} on {peft_format.peft_type}, which PEFT itself "
                "does not define"
            )
    if peft_format is LORA and (reason := starts.refusal(config)):
        raise AdapterError(f"{where}: it {reason}")
    if settings := starts.warning(config):
        warnings.warn(f"{where}: {settings}", LorakinWarning, stacklevel=2)


def method_of(
    peft_format: PeftFormat, config: Mapping[str, Any], part: LorakinPart | None, where: str
) -> Method:
    """Returns the method with its settings.

    lorakin's part names the members, if there is one. For an adapter whose tensors PEFT can hold,
    the settings in PEFT's config win, so that edits of it count.
    """
    settings = {
        name: config.get(field, peft_format.defaults[field])
        for name, field in peft_format.fields.items()
    }
    if peft_format.alpha_fallback and settings["alpha"] <= 0:
        settings["alpha"] = settings[peft_format.alpha_fallback]
    try:
        if part is None:
            method = _method_of_peft(peft_format, config, settings)
        else:
            method = _method_of_part(part, settings)
    except (TypeError, SettingError) as error:
        raise AdapterError(f"{where}: its settings do not make a valid method: {error}") from None
    _check_flags(peft_format, config, method, where)
    return method


def _method_of_peft(
    peft_format: PeftFormat, config: Mapping[str, Any], settings: Mapping[str, Any]
) -> Method:
    settings = {**settings, **dict.fromkeys(SCHEDULE)}
    members = []
    for kind in members_of(peft_format, config):
        names = kind.setting_names()
        members.append(kind(**{name: v for name, v in settings.items() if name in names}))
    return Method.of(members)


def _method_of_part(part: LorakinPart, settings: Mapping[str, Any]) -> Method:
    members: list[Member] = [entry.build() for entry in part.members]
    method = Method.of(members)
    settings = {name: value for name, value in settings.items() if name not in SCHEDULE}
    if part.tensors is not None or all(method.setting(n) == value for n, value in settings.items()):
        return method
    pairs = [member for member in members if isinstance(member, Parametrisation)] or members
    return Method.of(
        [_with_pair_settings(member, settings) if member in pairs else member for member in members]
    )


def _with_pair_settings(member: Member, settings: Mapping[str, Any]) -> Member:
    """Returns a member with the settings of its pair that the config has."""
    names = member.pair_settings if isinstance(member, Modifier) else member.setting_names()
    of_pair = {name: value for name, value in settings.items() if name in names}
    return dataclasses.replace(member, **of_pair)  # type: ignore[type-var]


def _check_flags(
    peft_format: PeftFormat, config: Mapping[str, Any], method: Method, where: str
) -> None:
    """Checks that the method has a gain if and only if the config says so."""
    for flag in FLAGS:
        if peft_format is not TOKENS_ONLY and method.has_gain != bool(config.get(flag)):
            raise AdapterError(
                f"{where}: adapter_config.json says {flag}={config.get(flag, False)!r}, but "
                f"lorakin.json says that the method is {method.words}"
            )
