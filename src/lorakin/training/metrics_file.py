"""`metrics.jsonl`, the figures of a run: written while it lasts, read, and drawn."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from lorakin.errors import DataError
from lorakin.storage import atomic, files
from lorakin.storage.schema import Check, Count, SchemaError, checked

MOST_BYTES = 1 << 28
"""The longest file that is read; a million steps take some hundred million bytes."""
KINDS: dict[str, Any] = {
    "step": Count,
    "rows": str | int,
    "eval_count": Annotated[float, Check("a count", lambda count: 0 <= count < 1e15)],
}
"""Names in a row whose values are not plain numbers."""


NOT_DRAWN = ("eval_loss", "eval_count", "eval_perplexity")
"""Held-out figures that have no curve of their own."""


class Metrics:
    """`metrics.jsonl`: one JSON object a line, appended as the run goes on."""

    def __init__(self, path: Path, from_step: int = 0, writes: bool = True) -> None:
        """Opens the file; rows after `from_step`, left by an interrupted run, are dropped.

        Args:
            path: the file.
            from_step: the step from which the run goes on.
            writes: whether this process writes; of several, one does.
        """
        self.path, self.writes = path, writes
        if not writes:
            return
        kept = [row for row in self.rows() if row["step"] <= from_step] if from_step else []
        atomic.write(
            path.parent, {path.name: "".join(json.dumps(row) + "\n" for row in kept).encode()}
        )

    def add(self, step: int, **values: float) -> None:
        """Appends a row."""
        if not self.writes:
            return
        with files.open_for_append(self.path) as file:
            file.write((json.dumps({"step": step, **values}) + "\n").encode())

    def rows(self) -> list[dict[str, Any]]:
        """Returns all rows so far, without a last line that a kill cut off.

        Raises:
            DataError: the file holds something else.
        """
        if not self.path.exists():
            return []
        try:
            content = files.read_limited(self.path, MOST_BYTES, DataError).decode(
                "utf-8", errors="replace"
            )
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from None
        whole, _, rest = content.rpartition("\n")
        lines = whole.splitlines() + ([rest] if rest.endswith("}") else [])
        return [row_of(line, self.path, number) for number, line in enumerate(lines, 1) if line]

    def plot(self, path: Path) -> None:
        """Draws the training and the held-out loss over the steps, and other held-out figures."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        others = {name: points for name in self._others() if (points := self._points(name))[1:]}
        size = (7, 6.5 if others else 4)
        figure = plt.figure(figsize=size, layout="constrained")
        axes, *below = figure.subplots(1 + bool(others), sharex=True, squeeze=False)[:, 0]
        training, held_out = self._points("loss"), self._points("eval_loss")
        if training:
            axes.plot(
                *zip(*training, strict=True),
                color="tab:blue",
                alpha=0.35,
                linewidth=1,
                label="training, each step",
            )
            steps, losses = zip(*training, strict=True)
            axes.plot(
                steps,
                running_mean(losses),
                color="tab:blue",
                linewidth=2,
                label="training, running mean",
            )
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
        for name, points in others.items():
            label = name.removeprefix("eval_").replace("_", " ")
            below[0].plot(*zip(*points, strict=True), "o-", label=label)
        axes.set(ylabel="loss")
        for part in (axes, *below):
            part.set(xlabel="step")
            part.grid(alpha=0.3)
            part.legend()
        write_figure(figure, path)

    def _others(self) -> list[str]:
        """Returns the names of held-out figures besides the loss."""
        names = dict.fromkeys(name for row in self.rows() for name in row)
        return [n for n in names if n.startswith("eval_") and n not in NOT_DRAWN]

    def _points(self, name: str) -> list[tuple[int, float]]:
        return [(row["step"], row[name]) for row in self.rows() if name in row]


def row_of(line: str, path: Path, number: int) -> dict[str, Any]:
    """Returns a row from its line.

    Raises:
        DataError: it is something else; `path` and `number` say which line it is.
    """
    try:
        content = checked(dict[str, Any], json.loads(line))
        row = {
            name: checked(KINDS.get(name, float), value, name) for name, value in content.items()
        }
        if "step" not in row:
            raise SchemaError("step is missing")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}, line {number} is not a row of metrics: {error}; remove that line"
        ) from None
    return row


def write_figure(figure: Any, path: Path) -> None:
    """Writes a figure of matplotlib as a PNG, whole or not at all, and closes it.

    Raises:
        OutputError: it cannot be written.
    """
    import matplotlib.pyplot as plt

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    plt.close(figure)
    atomic.write(path.parent, {path.name: drawn.getvalue()})


def running_mean(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Returns an exponential running mean that is unbiased at its start.

    >>> running_mean([1.0, 1.0, 1.0])
    [1.0, 1.0, 1.0]

    Args:
        values: the values.
        keep: the weight of what came before, in [0, 1).
    """
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out
