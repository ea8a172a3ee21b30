"""What every arm of a comparison may spend: steps or minutes of training, and perhaps trained parameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lorakin.errors import SettingError
from lorakin.family.settings import require

UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Optimizer steps, or minutes of training steps, of each trial; and the most numbers that an arm may train."""

    steps: int | None = None
    minutes: float | None = None
    params: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`steps=200`, `minutes=5`, `steps=200,params=500k`.

        Raises:
            SettingError: anything else, neither steps nor minutes, or both.
        """
        found: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = (piece.strip().lower() for piece in part.partition("="))
            require(
                name in ("steps", "minutes", "params") and name not in found,
                f"--budget takes steps=…, minutes=… and params=…, such as steps=200,params=500k, not {text!r}",
            )
            found[name] = _number(value, text)
        require(
            ("steps" in found) != ("minutes" in found),
            f"--budget needs steps=… or minutes=…, and not both, such as steps=200,params=500k; it is {text!r}",
        )
        for name in ("steps", "params"):
            if name in found:
                require(
                    found[name] == int(found[name]),
                    f"--budget {text!r}: {name} must be a whole number",
                )
                found[name] = int(found[name])
        return cls(**found)

    def steps_in(self, step_seconds: float) -> int:
        """How many steps an arm gets whose step takes so long."""
        return (
            self.steps if self.steps is not None else int((self.minutes or 0) * 60 / step_seconds)
        )

    def __str__(self) -> str:
        parts = [f"{value:,} steps" if name == "steps" else f"{value:g} minutes" if name == "minutes" else
                 f"at most {value:,} trained parameters"
                 for name, value in dataclasses.asdict(self).items() if value is not None]  # fmt: skip
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
