"""What happens when a field of the page changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lorakin.ui import page


def test_no_two_listeners_of_an_event_wait_for_their_answers(tmp_path: Path) -> None:
    """Such two wake each other without end: the page once asked ten times a second."""
    waiting = Counter(
        target
        for one in page.build(tmp_path).fns.values()
        if one.trigger_mode == "always_last"
        for target in one.targets
    )
    assert waiting
    assert [target for target, count in waiting.items() if count > 1] == []
