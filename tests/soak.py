"""How much the slow suite does, and what it found: `make soak` runs these tests with larger counts and prints their figures.

A test asks `count("LORAKIN_KILLS", 10)` how often to try, and tells `record(...)` what came of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MATRIX = "Members × bases × engines: how far the adapter is from one process on the plain numbers (relative)"
FOLDER = "LORAKIN_SOAK"
"""Names the variable that says where figures are kept; nothing is kept without it."""


def is_slow() -> bool:
    """Whether this is the slow suite."""
    return FOLDER in os.environ


def count(variable: str, usually: int) -> int:
    """How often to try: what the variable says, or `usually`."""
    return int(os.environ.get(variable) or usually)


def record(what: str, **figures: Any) -> None:
    """Keep the figures of one test."""
    if folder := os.environ.get(FOLDER):
        with (Path(folder) / "figures.jsonl").open("a") as file:
            file.write(json.dumps({"what": what, **figures}) + "\n")


def cell(what: str, row: str, column: str, value: str) -> None:
    """Keep one cell of a table that many tests fill."""
    record(what, row=row, column=column, value=value)


def rows_of(lines: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The lines of one table as its rows: those of `record` as they are, those of `cell` by row."""
    if any("column" not in line for line in lines):
        return [{key: str(value) for key, value in line.items()} for line in lines]
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        rows.setdefault(line["row"], {"": line["row"]})[line["column"]] = line["value"]
    return list(rows.values())


def main(folder: str) -> None:
    """Print the figures in `folder` as tables, in Markdown too, in `soak.md`."""
    lines = [json.loads(line) for line in (Path(folder) / "figures.jsonl").read_text().splitlines()]
    text, console = "", Console()
    for what in dict.fromkeys(line["what"] for line in lines):
        rows = rows_of(
            [
                {key: v for key, v in line.items() if key != "what"}
                for line in lines
                if line["what"] == what
            ]
        )
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = Table(*columns, title=what)
        for row in rows:
            table.add_row(*(row.get(column, "") for column in columns))
        console.print(table)
        head = [f"### {what}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        text += (
            "\n".join(
                head
                + [f"| {' | '.join(row.get(column, '') for column in columns)} |" for row in rows]
            )
            + "\n\n"
        )
    (Path(folder) / "soak.md").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
