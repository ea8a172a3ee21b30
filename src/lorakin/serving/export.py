"""Exports an adapter: writes it for another program, reads it back, compares it, then keeps it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import lorakin
from lorakin.errors import AdapterError, SettingError
from lorakin.family.low_rank import Fit
from lorakin.serving.job import ExportJob, ExportRequest
from lorakin.serving.output import new_directory, write_report
from lorakin.serving.sources import sources_of
from lorakin.serving.targets import TARGETS, ExportTarget
from lorakin.serving.verify import (
    LogitComparison,
    check_limit,
    compare_logits,
    record_logits,
    tolerance_for,
)
from lorakin.storage import directory, hub
from lorakin.waiting import waiting


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written, and how near it is to the trained model.

    Attributes:
        request: what was to be exported.
        size: the bytes of all files.
        agreement: the comparison with the trained model; None if it was left out.
        fits: path → how near the module's plain pair is to the adapter's change.
        made_from: what the files are that it was made from.
    """

    request: ExportRequest
    size: int
    agreement: LogitComparison | None
    fits: Mapping[str, Fit]
    made_from: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def lines(self) -> list[str]:
        """Returns the lines that the command prints."""
        lines = [f"{self.request.to} in {self.request.out} ({self.size / 2**20:,.1f} MiB)"]
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
            "order": dataclasses.asdict(self.request),
            "made_from": dict(self.made_from),
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


def export(request: ExportRequest) -> Exported:
    """Writes what `request` asks for into the new directory `request.out`, and compares it.

    Raises:
        SettingError: an unknown target, or settings that it does not have.
        AdapterError, ModelError, DataError: something cannot be loaded, or the target cannot hold
            it.
        VerificationError: what was written is not the model that was trained. Nothing is kept then.
        OutputError: `request.out` is not empty or cannot be written.
    """
    target = _checked_target(request)
    files = directory.read(hub.adapter_directory(request.adapter))
    name = request.model or files.config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise AdapterError(
            f"{request.adapter} does not say what its base model is; name it with --model"
        )
    job = ExportJob(request, files, name)
    made_from = sources_of(files.path, name)
    with new_directory(request.out) as partial:
        transcript = None
        if request.verify:
            with waiting("computing what the trained model says"):
                transcript = record_logits(job.loaded(), job.compared_ids())
        with waiting(f"writing {request.to}"):
            target.write(job, partial)
        agreement = None
        if transcript is not None:
            with waiting("comparing what was written"):
                written = target.read(job, partial)
                agreement = compare_logits(transcript, written)
            read_as = str(written.dtype).removeprefix("torch.")
            precisions = (transcript.dtype, read_as, request.dtype or target.dtypes[0])
            is_nearest = any(fit.error > 0 for fit in job.fits.values())
            tolerance = tolerance_for(precisions, is_nearest, request.max_kl)
            report = Exported(request, 0, agreement, job.fits).as_dict()
            agreement.check(tolerance, f"what was written ({request.to})", report)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        exported = Exported(request, size, agreement, job.fits, made_from)
        write_report(partial, exported.as_dict())
    return exported


def _checked_target(request: ExportRequest) -> type[ExportTarget]:
    """Returns the target, after checking that it has every setting of the request."""
    if request.to not in TARGETS:
        raise SettingError(f"--to {request.to} is unknown; choose from: {', '.join(TARGETS)}")
    target = TARGETS[request.to]
    if request.dtype is not None and request.dtype not in target.dtypes:
        raise SettingError(
            f"--to {request.to} writes {', '.join(target.dtypes)}, not --dtype {request.dtype}"
        )
    given = {
        "--rank": request.rank,
        "--error": request.error,
        "--portable": request.portable or None,
    }
    wrong = [option for option, value in given.items() if value is not None]
    if wrong and not target.is_pairs:
        raise SettingError(
            f"--to {request.to} changes the weights themselves, so it has no {wrong[0]}"
        )
    if request.data is not None and not target.is_pairs and not request.verify:
        raise SettingError(
            f"--to {request.to} needs --data only to compare, which --no-verify leaves out"
        )
    check_limit(request.max_kl)
    return target
