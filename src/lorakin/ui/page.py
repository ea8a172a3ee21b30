"""The page: its head, and the parts below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lorakin.ui import (
    compare_part,
    data_part,
    look_part,
    plan_part,
    recipe_form,
    ship_part,
    train_part,
    warm,
)
from lorakin.ui import runs as run_list
from lorakin.ui.ticks import Ticks

SLEEP = 0.02
"""Seconds between two looks of the server for requests."""
CSS = """
.problem { border-left: 4px solid #b91c1c; padding: .5rem .75rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.dark .problem { border-color: #f87171; }
.gradio-container .altair, .gradio-container .vega-embed { width: 100%; }
.dark button[role=tab].selected { color: var(--primary-400); }
.cm-line span { color: inherit !important; }
.dark .vega-embed canvas, .dark .vega-embed svg { filter: invert(1) hue-rotate(180deg); }
.framed { width: 100%; height: 80vh; border: 1px solid var(--border-color-primary); }
"""


def theme() -> Any:
    """Returns Gradio's own theme, with the reader's fonts: nothing is fetched."""
    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(
        # Its own greys and orange have a contrast of 1.9 and 2.8 to white; 4.5 can be read.
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )


def build(runs: Path) -> Any:
    """Returns the page over a folder of runs, as Gradio's Blocks."""
    with gr.Blocks(title="lorakin", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# lorakin")
        with gr.Row():
            model = recipe_form.input_of("model", value="smollm2", min_width=300)
            data = recipe_form.input_of("data", lines=1, max_lines=4, min_width=300)
        ticks = Ticks()
        with gr.Tab("Data"):
            inputs = data_part.build(model, data, runs)
        with gr.Tab("Plan") as tab:
            planned = plan_part.build(inputs, tab)
        with gr.Tab("Train") as tab:
            trained = train_part.build(inputs, runs, ticks, tab)
        with gr.Tab("Look"):
            looked = look_part.build(model, runs)
        with gr.Tab("Compare") as tab:
            compared = compare_part.build(inputs, runs, ticks, tab)
        with gr.Tab("Ship") as tab:
            shipped = ship_part.build(runs, ticks, tab)
        recipe_form.offer_methods([planned, trained, compared], page)
        _follow_adapters([looked, shipped], runs, ticks)
        ticks.begin()
    page.queue(default_concurrency_limit=8)
    # Gradio looks for requests every millisecond, which takes 7 % of a core from what trains here.
    page._queue.sleep_when_free = SLEEP
    return page


def _follow_adapters(inputs: list[Any], runs: Path, ticks: Ticks) -> None:
    """Offers the adapters that there are, as they come."""
    offered = gr.State([])

    def there_now(*values: Any) -> tuple[Any, ...]:
        *chosen, before = values
        now = run_list.adapters(runs) if warm.is_done() else before
        then = [still_chosen(one, before, now) for one in chosen]
        # What stays is not sent: the user may have chosen another one since.
        return now, [
            {} if one == at else {"value": at} for one, at in zip(chosen, then, strict=True)
        ]

    def shown(now: list[tuple[str, str]], changes: list[dict[str, str | None]]) -> tuple[Any, ...]:
        return (*(gr.Dropdown([*now], **change) for change in changes), now)

    ticks.follow(there_now, shown, [*inputs, offered], [*inputs, offered])


def still_chosen(
    chosen: str | None, before: Sequence[tuple[str, str]], now: Sequence[tuple[str, str]]
) -> str | None:
    """Returns the adapter that is chosen when others are offered; what the user typed stays.

    >>> earlier = [("a, checkpoint-2", "a/checkpoints/checkpoint-2")]
    >>> still_chosen("a/checkpoints/checkpoint-2", earlier, [("b", "b"), ("a", "a")])
    'a'
    >>> still_chosen("org/name", [], [("a", "a")])
    'org/name'
    """
    offered = [value for _, value in now]
    was_offered = chosen in [value for _, value in before]
    if chosen and (chosen in offered or not was_offered):
        return chosen
    # A run's checkpoint gives way to a later one, and at its end to the adapter.
    run = Path(chosen or "").parent.parent
    of_the_run = [value for value in offered if run in (Path(value), Path(value).parent.parent)]
    return next(iter(of_the_run or offered), None)
