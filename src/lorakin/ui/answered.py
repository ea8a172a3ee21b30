"""What every handler of the page has in common: errors of lorakin are shown as sentences."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from lorakin.errors import LorakinError
from lorakin.terminal import shortened, visible
from lorakin.ui import warm


def problem(error: LorakinError) -> str:
    """Returns an error as HTML that a screen reader reads out at once."""
    return f'<p role="alert" class="problem">{html.escape(visible(shortened(str(error))))}</p>'


def note(text: str) -> str:
    """Returns a message as HTML that a screen reader reads out when it is idle.

    >>> note("3 rows < 4")
    '<p role="status">3 rows &lt; 4</p>'
    """
    return f'<p role="status">{html.escape(visible(text))}</p>'


def answered(
    handler: Callable[..., tuple[Any, ...]], outputs: int, *, keeps: bool = False
) -> Callable[..., Any]:
    """Returns a handler of `outputs` values, and a last one for a sentence on what went wrong.

    Args:
        handler: returns the values, or raises a LorakinError.
        outputs: how many there are.
        keeps: whether they stay as they were after an error. What an earlier input made would look
            like the answer to this one, so otherwise they are emptied.
    """

    @functools.wraps(handler)
    def wrapped(*values: Any) -> tuple[Any, ...]:
        warm.wait()
        try:
            return (*handler(*values), "")
        except LorakinError as error:
            left = [gr.skip() for _ in range(outputs)] if keeps else emptied(outputs)
            return (*left, problem(error))

    return wrapped


def answered_in_pieces(
    handler: Callable[..., Iterator[tuple[Any, ...]]], outputs: int
) -> Callable[..., Any]:
    """Returns the same for a handler that yields values while they come."""

    @functools.wraps(handler)
    def wrapped(*values: Any) -> Iterator[tuple[Any, ...]]:
        warm.wait()
        try:
            for piece in handler(*values):
                yield (*piece, "")
        except LorakinError as error:
            yield (*emptied(outputs), problem(error))

    return wrapped


def emptied(count: int) -> list[Any]:
    """Returns values that empty so many components. Gradio takes each apart, so each is its own.

    >>> one, other = emptied(2)
    >>> one == other and one is not other
    True
    """
    return [gr.update(value=None) for _ in range(count)]


def place_for_problems() -> Any:
    """Returns the component that shows them."""
    return gr.HTML("", padding=False)


def follow(log: Any) -> None:
    """Keeps the end of a log in sight, unless the user has scrolled to another place."""
    place = f"#{log.elem_id} textarea"
    log.change(
        None,
        js=f"""() => {{
            const box = document.querySelector("{place}");
            const isRead = box && box.scrollTop && box.dataset.end - box.scrollTop > 80;
            setTimeout(() => {{
                if (!box || isRead) return;
                box.scrollTop = box.scrollHeight;
                box.dataset.end = box.scrollTop;
            }});
        }}""",
    )


def command_box(place: str, label: str = "The command") -> Any:
    """Returns the component that shows a command to copy; its id on the page is `place`."""
    return gr.Code(
        label=label, language="shell", interactive=False, lines=1, wrap_lines=True, elem_id=place
    )
