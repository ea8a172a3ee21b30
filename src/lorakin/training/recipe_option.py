"""How the command line offers a field of `Recipe`: its help, its names, and its group."""

from __future__ import annotations

import dataclasses

DATA, METHOD, OPTIMISATION = "Model and data", "Method", "Optimisation"
WATCHING, OUTPUT, DEVICES = "Watch and stop", "Output", "Memory and devices"
PANELS = (DATA, METHOD, OPTIMISATION, WATCHING, OUTPUT, DEVICES)
"""Groups of options, in the order of `lorakin train --help`."""


@dataclasses.dataclass(frozen=True)
class Option:
    """How the command line offers a field of `Recipe`.

    Attributes:
        panel: the group in which `lorakin train --help` lists it.
        help: what the field means.
        names: the option's names, where they are not just `--` and the field's name.
        default: the default in words, where the field's own value does not say it.
    """

    panel: str
    help: str
    names: tuple[str, ...] = ()
    default: str | None = None
