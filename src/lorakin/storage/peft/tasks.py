"""PEFT's `task_type` chooses the class that wraps the model; the class must suit file and model.

PEFT wraps a classifier's head by itself, by the ends of modules' names, and fails on a file without
that head. Each of its classes hands the model arguments of its own choice. If one of the two does
not suit, `task_type` stays null, and the plain `PeftModel` passes on what it is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

HEADS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score"), ("labels",)),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score"), ("labels",)),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",), ("start_positions", "end_positions")),
}
"""End of a class's name in transformers → the task, the ends of the names of the modules that PEFT
trains whole for it, and what its class hands the model."""
PASSED = ("input_ids", "attention_mask", "inputs_embeds")
FLAGS = ("output_attentions", "output_hidden_states", "return_dict")
"""What PEFT's classes hand every model, which may take the flags among `**kwargs`."""
DECODER = ("labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
KEPT_BACK = {"QUESTION_ANS": {"token_type_ids", "position_ids"}}
"""What PEFT's class for a task takes and does not hand on; a model that needs it is not suited."""


def task_of(model: nn.Module, whole: Collection[str]) -> str | None:
    """PEFT's word for the model's task, or None. `whole`: paths of modules trained whole."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    can_generate = getattr(model, "can_generate", None)
    if (
        callable(can_generate)
        and can_generate()
        and hasattr(model, "prepare_inputs_for_generation")
    ):
        decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if decodes:
            return "SEQ_2_SEQ_LM" if _takes(model, DECODER) else None
        return "CAUSAL_LM" if _takes(model, ("labels",)) else None
    for ending, (task, heads, more) in HEADS.items():
        if type(model).__name__.endswith(ending):
            return (
                task
                if _takes(model, more, KEPT_BACK.get(task, ()))
                and _holds_heads(model, heads, whole)
                else None
            )
    return None


def is_classifiers(config: Mapping[str, Any], base_class: str | None) -> bool:
    """Returns whether an adapter holds a classifier's head, by its config and its base's class.

    >>> is_classifiers({"modules_to_save": ["score"]}, "LlamaForSequenceClassification")
    True
    """
    ending = "ForSequenceClassification"
    task, heads, _ = HEADS[ending]
    if config.get("task_type") == task:
        return True
    return (base_class or "").endswith(ending) and any(
        name.endswith(heads) for name in config.get("modules_to_save") or ()
    )


def _holds_heads(model: nn.Module, heads: tuple[str, ...], whole: Collection[str]) -> bool:
    """Returns whether the file has every module that PEFT takes for the head, and there is one."""
    wanted = [
        path
        for path, module in model.named_modules()
        if path.endswith(heads) and any(True for _ in module.parameters())
    ]
    return bool(wanted) and all(path in whole for path in wanted)


def _takes(model: nn.Module, more: Iterable[str], kept_back: Iterable[str] = ()) -> bool:
    """Returns whether the model's forward takes these arguments, and none that PEFT keeps back."""
    parameters = inspect.signature(model.forward).parameters
    anything = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )
    wanted = {*PASSED, *more, *(() if anything else FLAGS)}
    return parameters.keys() >= wanted and parameters.keys().isdisjoint(kept_back)
