"""What happens when a field of the page changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr


def change_of(shared: Sequence[Any]) -> Any:
    """Returns an event for one listener, which comes when a field changes that others follow, too.

    Gradio lets a listener with `trigger_mode="always_last"` wait while its last answer is computed.
    Then it fires the event again, for all its listeners: two of them would wake each other without
    end. So each part of the page has an event of its own.
    """
    count = gr.Number(0, visible="hidden")
    gr.on(
        [field.change for field in shared], None, [count], [count], js="count => count + 1",
        show_progress="hidden", trigger_mode="multiple",
    )  # fmt: skip
    return count.change


def emptied_by_edits(place: Any, fields: Sequence[Any]) -> None:
    """Empties a place when the user edits a field: it says what a button made of what was there."""
    gr.on(
        [field.input for field in fields], None, outputs=[place], js="() => ''",
        show_progress="hidden", trigger_mode="multiple",
    )  # fmt: skip
