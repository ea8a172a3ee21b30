"""What a page follows on the disk, by one request for all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from lorakin.ui import page
from lorakin.ui.ticks import Ticks


def ticking(blocks: Any) -> list[Any]:
    """The functions that a timer of a page calls."""
    return [
        one.fn for one in blocks.fns.values() if any(event == "tick" for _, event in one.targets)
    ]


def test_each_handler_gets_its_inputs_and_gives_its_outputs() -> None:
    with gr.Blocks() as blocks:
        one, two = gr.Textbox(), gr.Textbox()
        ticks = Ticks()
        ticks.add(lambda a: (a + "!", "seen"), [one], [one, two])
        ticks.add(lambda: ("alone",), [], [two])
        ticks.add(lambda a, b: (a + b,), [one, two], [one])
        ticks.begin()
    (tick,) = ticking(blocks)
    assert tick("a", "b", "c") == ("a!", "seen", "alone", "bc")


def test_a_page_makes_one_request_for_all_that_it_follows(tmp_path: Path) -> None:
    assert len(ticking(page.build(tmp_path))) == 1
