"""The part Plan: the table of `lorakin plan`, which changes as one types."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lorakin.errors import SettingError
from lorakin.terminal import command
from lorakin.training.recipe_words import defaults
from lorakin.ui import recipe_form
from lorakin.ui.answered import answered, command_box, note, place_for_problems
from lorakin.ui.changes import change_of
from lorakin.ui.data_part import DataInputs

OPEN = ("rank", "batch_size", "max_length")
MORE = (
    "task", "targets", "accumulate", "packing", "gradient_checkpointing", "fuse", "dtype",
    "quantize",
)  # fmt: skip
OF_THE_CONDITIONS = ("batch_size", *MORE)
ALSO = ("exclude", "layers", "modules_to_save", "rank_above")
"""What a plan asks for, too; the page leaves it at the default."""


def build(data: DataInputs, tab: Any) -> Any:
    """Builds the part in a tab, which shows the plan when it is chosen.

    Returns:
        the component that chooses methods.
    """
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            methods = recipe_form.methods_input("plan-methods")
            memory = gr.Textbox(
                label="memory", placeholder="what is free here", elem_id="plan-memory",
                info="Memory available, such as 24GB.",
            )  # fmt: skip
            fields = {name: recipe_form.input_of(name, elem_id=f"plan-{name}") for name in OPEN}
            with gr.Accordion("More", open=False):
                fields |= {
                    name: recipe_form.input_of(name, elem_id=f"plan-{name}") for name in MORE
                }
            refresh = gr.Button("Plan", variant="primary", elem_id="plan")
        with gr.Column(scale=3, min_width=300):
            problem = place_for_problems()
            said = gr.HTML("", padding=False)
            table = gr.Dataframe(label="The plan", interactive=False, elem_id="plan-table")
            then = gr.Textbox(
                label="What follows", lines=6, interactive=False, elem_id="plan-lines"
            )
            line = command_box("plan-command")
    outputs = [said, table, then, line]
    names = tuple(fields)
    inputs = [data.model, methods, memory, *fields.values()]
    told: dict[str, Any] = {
        "fn": answered(lambda *values: _planned(names, *values), len(outputs)),
        "inputs": inputs, "outputs": [*outputs, problem], "trigger_mode": "always_last",
        "show_progress": "full",
    }  # fmt: skip
    changes = [change_of([data.model]), *(component.change for component in inputs[1:])]
    gr.on([refresh.click, tab.select, *changes], **told)
    return methods


def _planned(
    names: tuple[str, ...], model: str | None, methods: list[str], memory: str | None, *values: Any
) -> tuple[Any, ...]:
    from lorakin.plan.advice import advise
    from lorakin.plan.table import TITLES, cells_of

    model, memory = ((text or "").strip() for text in (model, memory))
    if not model:
        raise SettingError("model is missing; name it at the head of the page")
    raw = recipe_form.raw_of(names, values)
    fields = recipe_form.fields_of(raw)
    advice = advise(
        model, methods or None, fields.pop("rank", None), None, labels=None,
        max_length=fields.pop("max_length", None), steps=1000, device=None,
        memory=memory or None, **(defaults(*OF_THE_CONDITIONS, *ALSO) | fields),
    )  # fmt: skip
    words = ["--model", model, *(["--methods", " ".join(methods)] if methods else [])]
    words += [*recipe_form.words_of(raw), *(["--memory", memory] if memory else [])]
    head = f"{advice.headline}. Memory: {advice.memory_line}."
    table = gr.Dataframe([*cells_of(advice)], headers=list(TITLES))
    return note(head), table, "\n".join(advice.lines()), command("lorakin", "plan", *words)
