"""Shows which operations make a step slower than the frozen base's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.steps import step_of
from benchmarks.subjects import SUBJECTS, Decoder, batch, ours

STEPS = 4


def measure(
    base: Decoder, names: Sequence[str], length: int = 256, rows: int = 4, most: int = 8
) -> list[dict[str, Any]]:
    """Returns, for each member, the operations that add most to a step.

    Each row has the operation's own milliseconds, in the frozen base and with the adapter.
    """
    inputs, table = batch(base, rows, length), []
    frozen = _times(step_of(base, inputs))
    for name in names:
        model, _ = ours(base, SUBJECTS[name])
        adapted = _times(step_of(model, inputs))
        kinds = sorted(
            adapted.keys() | frozen.keys(),
            key=lambda kind: frozen.get(kind, 0) - adapted.get(kind, 0),
        )
        for kind in ("all", *[kind for kind in kinds if kind != "all"][:most]):
            table.append(
                {
                    "member": name,
                    "operation": kind,
                    "frozen": frozen.get(kind, 0),
                    "lorakin": adapted.get(kind, 0),
                }
            )
            print(
                f"{name}, {kind}: {table[-1]['frozen']:.1f} ms, "
                f"with the adapter {table[-1]['lorakin']:.1f}",
                flush=True,
            )
    return table


def _times(step: Any) -> dict[str, float]:
    """Returns the milliseconds of a step by operation, and of all operations."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(STEPS):
            step()
    times = {event.key: event.self_cpu_time_total / 1e3 / STEPS for event in seen.key_averages()}
    return {"all": sum(times.values()), **times}
