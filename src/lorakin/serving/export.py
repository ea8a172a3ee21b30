"""Exports an adapter: it is written for another program, read back, compared, and then kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import lorakin
from lorakin.errors import AdapterError, SettingError
from lorakin.family.low_rank import Fit
from lorakin.serving.job import ExportJob, Order
from lorakin.serving.output import new_directory, write_report
from lorakin.serving.targets import TARGETS, ExportTarget
from lorakin.serving.verify import Agreement, check_limit, compare, record, tolerance_for
from lorakin.storage import directory, hub


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written, and how near it is to what was trained; `fits` are by module path."""

    order: Order
    size: int
    agreement: Agreement | None
    fits: Mapping[str, Fit]

    def lines(self) -> list[str]:
        """Returns what a user wants to know, in lines."""
        lines = [f"{self.order.to} in {self.order.out} ({self.size / 2**20:,.1f} MiB)"]
        if any(fit.error for fit in self.fits.values()):
            worst = sorted(self.fits.items(), key=lambda item: -item[1].error)[:3]
            lines.append("nearest pairs, worst first:")
            lines += [f"  {path}: {_described(fit)}" for path, fit in worst]
            ranks = [fit.rank for fit in self.fits.values()]
            lines.append(f"ranks {min(ranks)} to {max(ranks)}, {sum(ranks)} in all")
        with_trained = f"compared with the trained model: {self.agreement}"
        return [*lines, "not compared" if self.agreement is None else with_trained]

    def as_dict(self) -> dict[str, Any]:
        """Returns the report."""
        return {
            "lorakin": lorakin.__version__,
            "order": dataclasses.asdict(self.order),
            "bytes": self.size,
            "verified": None if self.agreement is None else self.agreement.as_dict(),
            "modules": {path: dataclasses.asdict(fit) for path, fit in self.fits.items()},
        }


def _described(fit: Fit) -> str:
    parts = [f"rank {fit.rank}", f"relative error {fit.error:.3g}"]
    if fit.output_error is not None:
        parts.append(f"of the outputs {fit.output_error:.3g}")
    if fit.gain is not None:
        parts.append(f"largest |g − 1| {fit.gain:.3g}")
    return ", ".join(parts)


def export(order: Order) -> Exported:
    """Writes what the order asks for into the new directory `order.out`, and compares it.

    Raises:
        SettingError: an unknown target, or settings that it does not have.
        AdapterError, ModelError, DataError: something cannot be loaded, or the target cannot hold
            it.
        VerificationError: what was written is not the model that was trained. Nothing is kept then.
        OutputError: `order.out` is not empty or cannot be written.
    """
    target = _target(order)
    files = directory.read(hub.adapter_directory(order.adapter))
    name = order.model or files.config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise AdapterError(
            f"{order.adapter} does not say what its base model is; name it with --model"
        )
    job = ExportJob(order, files, name)
    with new_directory(order.out) as partial:
        transcript = record(job.base(), job.texts()) if order.verify else None
        target.write(job, partial)
        agreement = None
        if transcript is not None:
            written = target.read(job, partial)
            agreement = compare(transcript, written)
            read_as = str(written.dtype).removeprefix("torch.")
            precisions = (transcript.dtype, read_as, order.dtype or target.dtypes[0])
            is_nearest = any(fit.error > 0 for fit in job.fits.values())
            tolerance = tolerance_for(precisions, is_nearest, order.max_kl)
            report = Exported(order, 0, agreement, job.fits).as_dict()
            agreement.check(tolerance, f"what was written ({order.to})", report)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        exported = Exported(order, size, agreement, job.fits)
        write_report(partial, exported.as_dict())
    return exported


def _target(order: Order) -> type[ExportTarget]:
    """Returns the target, after checking that it has every setting."""
    if order.to not in TARGETS:
        raise SettingError(f"--to {order.to} is unknown; there are: {', '.join(TARGETS)}")
    target = TARGETS[order.to]
    if order.dtype is not None and order.dtype not in target.dtypes:
        raise SettingError(
            f"--to {order.to} writes {', '.join(target.dtypes)}, not --dtype {order.dtype}"
        )
    given = {"--rank": order.rank, "--error": order.error, "--portable": order.portable or None}
    wrong = [name for name, value in given.items() if value is not None]
    if wrong and not target.is_pairs:
        raise SettingError(
            f"--to {order.to} changes the weights themselves, so it has no {wrong[0]}"
        )
    if order.data is not None and not target.is_pairs and not order.verify:
        raise SettingError(
            f"--to {order.to} needs --data only to compare, which --no-verify leaves out"
        )
    check_limit(order.max_kl)
    return target
