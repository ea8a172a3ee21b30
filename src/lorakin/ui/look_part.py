"""The part Look: what an adapter answers beside its base, and what it changed."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from lorakin.errors import DataError, SettingError
from lorakin.training.recipe_file import read_recipe
from lorakin.training.run_files import CHECKPOINTS, RECIPE
from lorakin.ui.answered import answered, answered_in_pieces, place_for_problems

ROWS, MOST_ROWS = 4, 64
"""Held-out rows that are answered if the user does not say how many, and the most."""


def build(model: Any, runs: Path) -> Any:
    """Builds the part; returns the component that chooses an adapter.

    Args:
        model: the field at the head of the page.
        runs: the folder of the runs.
    """
    with gr.Row():
        adapter = adapter_input("look-adapter")
        tokens = gr.Number(
            64, label="max new tokens", precision=0, elem_id="look-tokens",
            info="The most tokens of an answer.",
        )  # fmt: skip
        temperature = gr.Number(
            0, label="temperature", info="0 takes the likeliest token each time."
        )
    problem = place_for_problems()
    prompt = gr.Textbox(label="prompt", lines=2, elem_id="prompt")
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", elem_id="ask")
        stop = gr.Button("Stop the answer")
    with gr.Row():
        said = [
            gr.Textbox(
                label=label, lines=6, max_lines=20, interactive=False, min_width=300, elem_id=place
            )
            for label, place in (("The base", "said-base"), ("The adapter", "said-adapter"))
        ]
    asking = ask.click(
        answered_in_pieces(_said, 2), [model, adapter, prompt, tokens, temperature],
        [*said, problem], concurrency_limit=1,
    )  # fmt: skip
    stop.click(None, cancels=[asking])

    gr.Markdown("## Held-out rows")
    count = gr.Number(ROWS, label="rows", precision=0, elem_id="row-count")
    read = gr.Button("Answer held-out rows", elem_id="held-out")
    table = gr.Dataframe(
        headers=["asked", "right", "the base", "the adapter"], label="Both answers",
        interactive=False, wrap=True, elem_id="held-out-table", column_widths=["25%"] * 4,
    )  # fmt: skip
    read.click(
        answered(lambda *values: (_rows(*values),), 1), [model, adapter, tokens, count],
        [table, problem], concurrency_limit=1,
    )  # fmt: skip

    gr.Markdown("## What it changed")
    inspect = gr.Button("Inspect", elem_id="inspect")
    pictures = gr.HTML("", label="lorakin inspect", elem_id="inspected")
    inspect.click(answered(lambda name: (_inspected(name),), 1), [adapter], [pictures, problem])
    return adapter


def adapter_input(place: str) -> Any:
    """Returns the component in which an adapter is chosen, or a hub id typed."""
    return gr.Dropdown(
        [], label="adapter", allow_custom_value=True, min_width=300, elem_id=place,
        info="A run's adapter or last checkpoint; another directory or a hub id may be typed.",
    )  # fmt: skip


def framed(page: str, title: str) -> str:
    """Returns a page in a frame of its own, as HTML.

    >>> framed("<p>1</p>", "a page")[:40]
    '<iframe title="a page" sandbox="allow-sc'
    """
    return (
        f'<iframe title="{html.escape(title)}" sandbox="allow-scripts allow-downloads" '
        f'class="framed" srcdoc="{html.escape(page)}"></iframe>'
    )


def _checked(adapter: str | None) -> str:
    name = (adapter or "").strip()
    if not name:
        raise SettingError("adapter is missing; choose a run's, or type a directory or hub id")
    return name


def _version(adapter: str) -> int:
    """Returns a number that changes with the adapter's files; 0 for a hub id."""
    try:
        return (Path(adapter) / "adapter_model.safetensors").stat().st_mtime_ns
    except OSError:
        return 0


def _said(
    model: str, adapter: str | None, prompt: str, tokens: float, temperature: float
) -> Iterator[tuple[str, ...]]:
    from lorakin.training.sampling import Sampling
    from lorakin.ui import answering

    name = _checked(adapter)
    if not (prompt or "").strip():
        raise SettingError("prompt is missing; type what is to be answered")
    sampling = Sampling(int(tokens or 0), float(temperature or 0))
    speakers = answering.speakers_of((model or "").strip(), name, _version(name))
    yield from answering.side_by_side(speakers, prompt, sampling)


def _rows(model: str, adapter: str | None, tokens: float, count: float) -> list[list[str]]:
    from lorakin.training.contents import Conversation, PlainText
    from lorakin.training.prepare import held_out_rows, read_data
    from lorakin.training.prompts import Prompt, without_answer
    from lorakin.training.sampling import Sampling
    from lorakin.ui import answering

    name, count = _checked(adapter), int(count or 0)
    if not 1 <= count <= MOST_ROWS:
        raise SettingError(f"rows must lie between 1 and {MOST_ROWS}, not {count}")
    recipe = read_recipe(_recipe_of(name), {"out": "unused"})
    records = held_out_rows(recipe, read_data(recipe))[1].records[:count]
    wrong = [one for one in records if not isinstance(one.content, Conversation | PlainText)]
    if wrong:
        raise DataError(
            f"{wrong[0].where} has no question and answer in words; lorakin evaluate shows what "
            "was answered to such rows"
        )
    prompts = [
        Prompt(number, record.where, {}, without_answer(record.content))
        for number, record in enumerate(records)
    ]
    speakers = answering.speakers_of((model or "").strip(), name, _version(name))
    said = answering.answered_rows(speakers, prompts, Sampling(int(tokens or 0)))
    return [
        [*_asked_and_right(record.content), *answers]
        for record, answers in zip(records, said, strict=True)
    ]


def _recipe_of(adapter: str) -> Path:
    """Returns the recipe of the run that an adapter or a checkpoint is of.

    Raises:
        DataError: there is none.
    """
    path = Path(adapter)
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    if not (run / RECIPE).is_file():
        raise DataError(f"{adapter} has no {RECIPE}, so its held-out rows are not known")
    return run / RECIPE


def _asked_and_right(content: Any) -> tuple[str, str]:
    from lorakin.training.contents import PlainText

    if isinstance(content, PlainText):
        return content.prompt, content.answer
    words = [f"{message['role']}: {message['content']}" for message in content.messages]
    return "\n".join(words[:-1]), str(content.messages[-1]["content"])


def _inspected(adapter: str | None) -> str:
    from lorakin.report import adapter_page
    from lorakin.storage.hub import adapter_directory
    from lorakin.storage.summary import summarise

    name = _checked(adapter)
    return framed(adapter_page.render(summarise(adapter_directory(name))), f"The adapter {name}")
