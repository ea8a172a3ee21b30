"""Writes the figures as Markdown, each next to the target that it should meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BARS: dict[str, dict[str, tuple[float, float]]] = {
    "S float32": {
        "lora": (1.08, 1.38),
        "lora, dropout 0.05": (1.12, 1.38),
        "lora+": (1.08, 1.38),
        "lora-fa": (1.07, 1.01),
        "dora": (1.12, 1.6),
        "vera": (1.5, 1.14),
        "adalora": (1.13, 1.39),
        "delta-lora": (1.105, 1.38),
    },
    "S bfloat16": {
        "lora": (1.1, 1.33),
        "lora, dropout 0.05": (1.15, 1.33),
        "lora+": (1.1, 1.33),
        "lora-fa": (1.08, 1.01),
        "dora": (1.15, 1.55),
        "vera": (1.3, 1.12),
        "adalora": (1.14, 1.34),
        "delta-lora": (1.125, 1.33),
    },
    "W float32": {
        "lora": (1.04, 1.38),
        "lora, dropout 0.05": (1.06, 1.38),
        "lora+": (1.04, 1.38),
        "lora-fa": (1.03, 1.01),
        "dora": (1.08, 1.6),
        "vera": (1.23, 1.14),
        "adalora": (1.05, 1.39),
        "delta-lora": (1.065, 1.38),
    },
    "W bfloat16": {
        "lora": (1.05, 1.33),
        "lora, dropout 0.05": (1.08, 1.33),
        "lora+": (1.05, 1.33),
        "lora-fa": (1.05, 1.01),
        "dora": (1.09, 1.55),
        "vera": (1.2, 1.12),
        "adalora": (1.09, 1.34),
        "delta-lora": (1.075, 1.33),
    },
}
"""Bars for each member: time and saved bytes over the frozen base's."""
CHORES = {
    "optimizer": 0.25,
    "put": 0.3,
    "load": 0.1,
    "save": 0.4,
    "merge": 0.3,
    "adalora: a": 0.3,
    "adalora: r": 0.3,
}
SERVING = {1: 0.35, 32: 0.7, 128: 0.8}


def markdown(results: dict[str, Any]) -> str:
    """Returns all parts that were measured."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    clock = "one thread's own time" if machine["clock"] == "thread" else "wall time"
    lines = [
        f"{machine['device']}, threads: {machine['threads']}; {versions}. "
        f"Times: {clock}, median (lowest–highest).",
        "",
    ]
    for kind, rows in results.get("steps", {}).items():
        lines += [
            f"**A step, {kind}: × the frozen base**",
            "",
            *_steps(rows, kind, machine["clock"]),
            "",
        ]
    for name, make in (
        ("whole", _whole),
        ("chores", _chores),
        ("serving", _serving),
        ("dispatch", _dispatch),
        ("accuracy", _accuracy),
        ("profile", _profile),
    ):
        if name in results:
            lines += [*make(results, machine["clock"]), ""]
    for dtype, rows in results.get("compiled", {}).items():
        by_member: dict[str, dict[str, str]] = {}
        for row in rows:
            by_member.setdefault(row["member"], {})[row["variant"]] = _spread(row[machine["clock"]])
        head = ["lorakin", "PEFT", "lorakin ÷ PEFT"]
        cells = [[name, *(of[variant] for variant in head)] for name, of in by_member.items()]
        lines += [
            f"**torch.compile, S, {dtype}: a step × the compiled frozen base**",
            "",
            *_table(["member", *head], cells),
            "",
        ]
    if "scaling" in results:
        lines += [*_scaling(results["scaling"]), ""]
    return "\n".join(lines)


def _steps(rows: Sequence[dict[str, Any]], kind: str, clock: str) -> list[str]:
    cells = []
    for row in rows:
        bar = BARS.get(kind, {}).get(row["member"]) if row["variant"] == "lorakin" else None
        time, saved = (f"{bar[0]:.3g}", f"{bar[1]:.3g}") if bar else ("", "")
        cells.append(
            [row["member"], row["variant"], _spread(row[clock]), time, f"{row['saved']:.2f}", saved]
        )
    return _table(["member", "variant", "time", "bar", "saved bytes", "bar"], cells)


def _whole(results: dict[str, Any], clock: str) -> list[str]:
    lines = []
    for dtype, rows in results["whole"].items():
        peak = results.get("peak", {}).get(dtype)
        if peak is None:
            continue
        times = {"frozen": "1", **{row["variant"]: _spread(row[clock]) for row in rows}}
        cells = [
            [name, times[name], f"{mib:.0f}", f"{mib / peak['peft']:.2f}"]
            for name, mib in peak.items()
        ]
        head = ["variant", "step, × frozen", "peak of a step over idle, MiB", "× PEFT"]
        lines += [
            f"**A whole model with head and loss, S, {dtype}** (step: 6 layers; peak: 12)",
            "",
            *_table(head, cells),
        ]
    return lines


def _chores(results: dict[str, Any], clock: str) -> list[str]:
    bars = {
        row["chore"]: next(bar for start, bar in CHORES.items() if row["chore"].startswith(start))
        for row in results["chores"]
    }
    cells = [
        [row["chore"], _spread(row[clock]), f"{bars[row['chore']]:.2f}"]
        for row in results["chores"]
    ]
    return ["**Around the steps, × PEFT**", "", *_table(["", "time", "bar"], cells)]


def _serving(results: dict[str, Any], clock: str) -> list[str]:
    cells = [
        [
            str(row["tokens"]),
            _spread(row["over PEFT"]),
            f"{SERVING[row['tokens']]:.2f}",
            _spread(row["over base"]),
        ]
        for row in results["serving"]
    ]
    head = ["tokens a request", "× PEFT", "bar", "× base alone"]
    return ["**16 requests for 8 adapters in one batch, forward**", "", *_table(head, cells)]


def _dispatch(results: dict[str, Any], clock: str) -> list[str]:
    cells = [
        [row["member"], _spread(row["step"]), _spread(row["forward"])]
        for row in results["dispatch"]
    ]
    head = ["member", "step", "forward without gradients"]
    return ["**Dispatch: one token through one layer, × PEFT**", "", *_table(head, cells)]


def _accuracy(results: dict[str, Any], clock: str) -> list[str]:
    kinds = list(results["accuracy"])
    names = {
        (row["member"], row["variant"]): None
        for rows in results["accuracy"].values()
        for row in rows
    }
    known = {
        kind: {(row["member"], row["variant"]): row["error"] for row in rows}
        for kind, rows in results["accuracy"].items()
    }
    cells = [[*name, *(f"{known[kind][name]:.2g}" for kind in kinds)] for name in names]
    return [
        "**Gradients of the trained tensors: error relative to float64**",
        "",
        *_table(["member", "variant", *kinds], cells),
    ]


def _scaling(rows: Sequence[dict[str, Any]]) -> list[str]:
    def bytes_of(row: dict[str, Any], name: str) -> str:
        return f"{row[f'{name} saved']:.2f}" if f"{name} saved" in row else ""

    cells = [
        [
            row["axis"],
            str(row["value"]),
            _spread(row["lorakin"]),
            f"{row['arithmetic']:.2f}" if "arithmetic" in row else "",
            _spread(row["PEFT"]),
            bytes_of(row, "lorakin"),
            bytes_of(row, "PEFT"),
        ]
        for row in rows
    ]
    head = [
        "axis",
        "value",
        "lorakin, × frozen",
        "arithmetic of the linears",
        "PEFT, × frozen",
        "saved, lorakin",
        "saved, PEFT",
    ]
    return ["**Scaling**", "", *_table(head, cells)]


def _profile(results: dict[str, Any], clock: str) -> list[str]:
    lines = []
    for kind, rows in results["profile"].items():
        cells = [
            [row["member"], row["operation"], f"{row['frozen']:.1f}", f"{row['lorakin']:.1f}"]
            for row in rows
            if row["operation"] == "all" or row["lorakin"] - row["frozen"] > 0.5
        ]
        head = ["member", "operation", "frozen, ms", "with the adapter, ms"]
        lines += [
            f"**Where the time goes, {kind}, under the profiler**",
            "",
            *_table(head, cells),
            "",
        ]
    return lines


def _spread(figures: Sequence[float]) -> str:
    return f"{figures[0]:.2f} ({figures[1]:.2f}–{figures[2]:.2f})"


def _table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]
