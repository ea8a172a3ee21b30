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


def test_each_part_gets_its_inputs_and_gives_its_outputs() -> None:
    with gr.Blocks() as blocks:
        one, two = gr.Textbox(), gr.Textbox()
        ticks = Ticks()
        ticks.follow(lambda a: (a,), lambda a: (a + "!", "both"), [one], [one, two])
        ticks.follow(lambda: ("alone",), lambda *found: found, [], [two])
        ticks.follow(lambda a, b: (b, a), lambda b, a: (b + a,), [one, two], [one])
        ticks.begin()
    (tick,) = ticking(blocks)
    first, second, third = "('a',)", "('alone',)", "('c', 'b')"
    assert tick("a", "", "", "b", "c", "") == (
        "a!", "both", first, "alone", second, "cb", third,
    )  # fmt: skip


def test_what_looks_as_before_is_not_shown_again() -> None:
    shown: list[str] = []
    with gr.Blocks() as blocks:
        one = gr.Textbox()
        ticks = Ticks()
        look = ticks.follow(lambda a: (a[:1],), lambda a: (shown.append(a),), [one], [one])
        ticks.begin()
    (tick,) = ticking(blocks)
    *_, seen = tick("abc", "")
    assert tick("abd", seen) == (gr.skip(), gr.skip())
    assert shown == ["a"]
    look["fn"]("b", seen)
    assert shown == ["a", "b"]


def test_a_page_makes_one_request_for_all_that_it_follows(tmp_path: Path) -> None:
    assert len(ticking(page.build(tmp_path))) == 1
