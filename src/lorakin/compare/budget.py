"""The budget of a comparison: steps or minutes of each trial, and the most trained parameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lorakin.errors import SettingError
from lorakin.family.settings import require

UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What each trial may use.

    Attributes:
        steps: optimizer steps of each trial; None if there are `minutes`.
        minutes: minutes of optimizer steps of each trial; None if there are `steps`.
        params: the most parameters that an arm may train; None for no limit.
    """

    steps: int | None = None
    minutes: float | None = None
    params: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads a budget from the command line.

        >>> Budget.parse("steps=200,params=500k")
        Budget(steps=200, minutes=None, params=500000)

        Raises:
            SettingError: the text has another form, or has both or neither of steps and minutes.
        """
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = (piece.strip().lower() for piece in part.partition("="))
            require(
                name in ("steps", "minutes", "params") and name not in values,
                "--budget takes steps=…, minutes=… and params=…, such as steps=200,params=500k, "
                f"not {text!r}",
            )
            values[name] = _number(value, text)
        require(
            ("steps" in values) != ("minutes" in values),
            "--budget needs either steps=… or minutes=…, such as steps=200,params=500k; "
            f"it is {text!r}",
        )
        for name in ("steps", "params"):
            if name in values:
                require(
                    values[name] == int(values[name]),
                    f"--budget {text!r}: {name} must be a whole number",
                )
                values[name] = int(values[name])
        return cls(**values)

    def steps_in(self, step_seconds: float) -> int:
        """Returns how many steps of `step_seconds` seconds fit into the budget."""
        if self.steps is not None:
            return self.steps
        return int((self.minutes or 0) * 60 / step_seconds)

    def __str__(self) -> str:
        parts = []
        if self.steps is not None:
            parts.append(f"{self.steps:,} steps")
        if self.minutes is not None:
            parts.append(f"{self.minutes:g} minutes")
        if self.params is not None:
            parts.append(f"at most {self.params:,} trained parameters")
        return ", ".join(parts)


def _number(value: str, text: str) -> float:
    unit = UNITS.get(value[-1:], 1.0)
    try:
        number = float(value[:-1] if unit > 1 else value) * unit
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise SettingError(
            f"--budget {text!r}: expected a positive number such as 200 or 500k, not {value!r}"
        )
    return number
