"""The results of `benchmarks.gpu`: kept in a file after every cell, and written as one table.

Without torch, so that the process that watches the others needs none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ESTIMATES = Path(__file__).parents[1] / "docs" / "evidence" / "gpu.md"


class Results:
    """What a run has measured so far, in `results.json` and `results.md` of its folder.

    An entry has its cell (shape, kind, subject), a state (waiting, begun, done), and figures. Plans
    come from another process, and stand in `plans.json`.
    """

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder, self.data = folder, data

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Reads the results of a run that has begun."""
        return cls(folder, json.loads((folder / "results.json").read_text(encoding="utf-8")))

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All cells, the most important first."""
        entries: list[dict[str, Any]] = self.data.get("cells", [])
        return entries

    @property
    def plans(self) -> dict[str, int | None]:
        """The peaks in bytes that were planned, by `key`; None if there is no plan."""
        path = self.folder / "plans.json"
        plans: dict[str, int | None] = {}
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else plans

    @staticmethod
    def key(entry: dict[str, Any]) -> str:
        """Returns the key of an entry's plan."""
        return f"{' | '.join(entry['cell'])} | {entry.get('rows')}"

    def add_plan(self, entry: dict[str, Any], peak: int | None) -> None:
        """Notes the planned peak of an entry; writes the plans alone."""
        self._replace("plans.json", json.dumps({**self.plans, self.key(entry): peak}, indent=1))

    def plan(self, cells: Sequence[Sequence[str]]) -> None:
        """Notes the cells of the run, if it has none yet."""
        self.data.setdefault("cells", [{"cell": list(c), "state": "waiting"} for c in cells])
        self.write()

    def begin_next(self) -> dict[str, Any] | None:
        """Returns the next cell that waits, as begun; None if none does."""
        for entry in self.entries:
            if entry["state"] == "waiting":
                entry["state"] = "begun"
                self.write()
                return entry
        return None

    def finish(self, entry: dict[str, Any], figures: dict[str, Any], seconds: float) -> None:
        """Notes the figures of a cell."""
        entry |= {"state": "done", "seconds": round(seconds, 1), **figures}
        self.write()

    def fail_begun(self, reason: str) -> None:
        """Notes for cells that were begun and never finished why."""
        for entry in self.entries:
            if entry["state"] == "begun":
                entry |= {"state": "done", "failed": reason}
        self.write()

    def write(self) -> None:
        """Writes both files whole: a run may be ended at any time."""
        self._replace("results.json", json.dumps(self.data, indent=1) + "\n")
        self._replace("results.md", "\n".join(markdown(self.data, self.plans)) + "\n")

    def _replace(self, name: str, text: str) -> None:
        partial = self.folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.folder / name)


def estimates(text: str) -> dict[str, dict[str, float]]:
    """Returns shape → subject → ratio to the frozen base, from the tables of docs/evidence/gpu.md.

    >>> estimates("**A step of 8B's shape, x**\\n\\n| subject | ms | × |\\n|---|---|---|\\n| a | 9 | 1.5 |")
    {'8B': {'a': 1.5}}
    """
    found: dict[str, dict[str, float]] = {}
    shape = ""
    for line in text.splitlines():
        if match := re.match(r"\*\*A step of (\w+)'s shape", line):
            shape = match[1]
        elif line.startswith("#"):
            shape = ""
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if shape and line.startswith("|") and re.fullmatch(r"\d+\.\d+", cells[-1]):
            found.setdefault(shape, {})[cells[0]] = float(cells[-1])
    return found


def markdown(data: dict[str, Any], plans: dict[str, int | None]) -> Iterator[str]:
    """Yields the lines of the tables."""
    yield f"**{data.get('machine', 'No GPU was reached')}**"
    yield ""
    yield f"The tests of `tests/gpu`: {data.get('tests', 'not run')}."
    known = estimates(ESTIMATES.read_text(encoding="utf-8")) if ESTIMATES.exists() else {}
    entries = data.get("cells", [])
    sections: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        if entry["state"] == "done":
            sections.setdefault(tuple(entry["cell"][:2]), []).append(entry)
    for (shape, kind), of_section in sections.items():
        yield ""
        if kind == "lorakin train":
            yield from _of_training(of_section)
        else:
            yield from _of_steps(shape, kind, of_section, known.get(shape, {}), plans)
    missing = [entry["cell"] for entry in entries if entry["state"] != "done"]
    if missing:
        yield ""
        named: dict[str, list[str]] = {}
        for shape, kind, subject in missing:
            named.setdefault(f"{shape} {kind}".strip(), []).append(subject)
        yield "Not measured: the time was over. " + "; ".join(
            f"{section}: {' · '.join(subjects)}" for section, subjects in named.items()
        )


def _of_steps(
    shape: str,
    kind: str,
    entries: Sequence[dict[str, Any]],
    known: dict[str, float],
    plans: dict[str, int | None],
) -> Iterator[str]:
    size = next((f"{e['rows']} × {e['length']} tokens, " for e in entries if "rows" in e), "")
    frozen = next((_spread(e["frozen ms"], 1) for e in entries if "frozen ms" in e), None)
    of_base = "" if frozen is None else f"; the frozen base takes {frozen} ms"
    what = {"compiled": "bfloat16, two layers, torch.compile"}.get(kind, kind)
    yield f"**A step, {shape}, {size}{what}**{of_base}"
    yield ""
    yield (
        "| subject | ms | × the frozen base | estimated (H100, 4 rows) | its error | peak, MiB | planned | "
        "planned ÷ peak |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for entry in entries:
        subject = entry["cell"][2]
        if "failed" in entry:
            yield f"| {subject} | {entry['failed'].replace('|', '/')} | – | – | – | – | – | – |"
            continue
        measured = entry["ratio"][0]
        guess = known.get(subject) if kind == "bfloat16" else None
        peak, planned = entry["peak"], plans.get(Results.key(entry))
        cells = [
            subject,
            _spread(entry["ms"], 1),
            _spread(entry["ratio"], 2),
            "–" if guess is None else f"{guess:.2f}",
            "–" if guess is None else f"{100 * (guess / measured - 1):+.0f} %",
            _mib(peak),
            _mib(planned),
            f"{planned / peak:.2f}" if planned and peak else "–",
        ]
        yield f"| {' | '.join(cells)} |"


def _of_training(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "**`lorakin train`, the whole command**"
    yield ""
    yield "| method | model | batch | tokens a second | memory, MiB |"
    yield "|---|---|---|---|---|"
    for entry in entries:
        subject = entry["cell"][2]
        if "failed" in entry:
            yield f"| {subject} | – | – | {entry['failed'].replace('|', '/')} | – |"
            continue
        batch, speed = f"{entry['rows']} × {entry['length']}", _spread(entry["tokens a second"], 0)
        yield f"| {subject} | {entry['model']} | {batch} | {speed} | {_mib(entry['memory'])} |"


def _spread(figures: Sequence[float], digits: int) -> str:
    median, low, high = (f"{figure:,.{digits}f}" for figure in figures)
    return f"{median} ({low}–{high})"


def _mib(size: int | None) -> str:
    return "–" if not size else f"{size / 2**20:,.0f}"
