"""What lorakin's own study found: what one may expect before a comparison has run.

prior.json is made from the study's rows by `python -m benchmarks.claims page`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from importlib import resources

from lorakin.compare.arms import PLAIN
from lorakin.storage.schema import Count, checked

FILE = "prior.json"
BETTER, SAME, WORSE = "better", "the same", "worse"
"""What the study's intervals can show of a method beside tuned LoRA."""


@dataclasses.dataclass(frozen=True)
class Prior:
    """What the study found.

    Attributes:
        tasks: the names of its tasks.
        found: method → verdict → on how many tasks. Where the numbers of a method do not add up to
            the tasks, the others could not tell it from LoRA.
    """

    tasks: list[str]
    found: dict[str, dict[str, Count]]

    def said_of(self, methods: Sequence[str]) -> str:
        """Returns what it says of some methods, in one sentence; "" if it has none of them.

        >>> Prior(["a", "b"], {"dora": {"the same": 2}, "vera": {"worse": 1}}).said_of(["dora"])
        'on 2 tasks of ours, none of these was better than tuned lora; the same: dora (2)'
        """
        known = {name: self.found[name] for name in methods if name in self.found}
        if not known:
            return ""
        tasks = "1 task" if len(self.tasks) == 1 else f"{len(self.tasks)} tasks"
        parts = []
        for verdict in (BETTER, SAME, WORSE):
            named = ", ".join(f"{n} ({c[verdict]})" for n, c in known.items() if c.get(verdict))
            if named:
                parts.append(f"{verdict}: {named}")
            elif verdict == BETTER:
                parts.append(f"none of these was better than tuned {PLAIN}")
        return f"on {tasks} of ours, {'; '.join(parts)}"


@functools.cache
def prior() -> Prior:
    """Returns what the study found."""
    text = resources.files("lorakin.compare").joinpath(FILE).read_text(encoding="utf-8")
    found: Prior = checked(Prior, json.loads(text))
    return found
