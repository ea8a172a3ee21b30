"""Compare methods on one model and data set: the same budget, seeds and rows, and a learning rate tuned for each.

The state of a comparison is its results file alone: what to run next is read off it (`schedule`), so that one which was
killed goes on with the same command. `workers` runs the trials.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import yaml
from rich.console import Console

from lorakin.adapter import adapt
from lorakin.compare import arms as arms_
from lorakin.compare import schedule, split, trial
from lorakin.compare.arms import Arm
from lorakin.compare.budget import Budget
from lorakin.compare.results import DONE, FAILED, REFUSED, SEED, TIMING, ResultRow, Results, Trial
from lorakin.compare.schedule import Sweep
from lorakin.errors import LorakinError, LorakinWarning, OutputError, SettingError
from lorakin.family import Method, method_named
from lorakin.family.settings import require
from lorakin.inject.layer_numbers import parse_layers
from lorakin.plan.skeleton import skeleton, supposed, trainable_parameters
from lorakin.storage import atomic, locks, paths
from lorakin.storage.schema import Misfit, fitted, shown
from lorakin.terminal import labelled
from lorakin.training.encoding import use_template, with_answers
from lorakin.training.limits import places_of, row_length
from lorakin.training.models import config_of, load_tokenizer
from lorakin.training.precision import resolve_dtype
from lorakin.training.reading import DataRows
from lorakin.training.recipe import Recipe, read_yaml
from lorakin.training.train import check_meant

SETTINGS, RESULTS, REPORT, LOCK = "comparison.yaml", "results.jsonl", "report.html", ".lock"
TRIALS, DATA = "trials", "data"
LEAST_STEPS = 4
"""Fewer steps are no run: warm-up and schedule need some."""


@dataclasses.dataclass
class Comparison:
    """What is compared, and how; the fields are the options of `lorakin compare`.

    `recipe` has what all trials' recipes share besides, such as batch_size. `sweep` is `auto`, or learning rates as text,
    `1e-4,3e-4`.
    """

    model: str
    data: str
    out: str
    methods: list[str]
    budget: str = "steps=200"
    seeds: int = 3
    sweep: str = "auto"
    eval_data: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"--seeds must be at least 1, not {self.seeds}")
        require(0 <= self.dropout < 1, f"--dropout must lie in [0, 1), not {self.dropout}")
        plain = method_named(arms_.PLAIN, {})
        self.rank = self.rank if self.rank is not None else int(plain.setting("rank"))
        scaling = plain.setting("alpha") / plain.setting("rank")
        self.alpha = self.alpha if self.alpha is not None else scaling * self.rank
        method_named(arms_.PLAIN, {"rank": self.rank, "alpha": self.alpha})
        self.spent, self.sweeps = Budget.parse(self.budget), parse_sweep(self.sweep)
        if self.spent.steps is not None and self.spent.steps < LEAST_STEPS:
            raise SettingError(
                f"--budget {self.budget} fits no trial: a run needs at least {LEAST_STEPS} steps"
            )
        self.base_recipe = Recipe(model=self.model, data=[self.data], out=self.out, **self.recipe)

    @property
    def size(self) -> tuple[int, float]:
        """Rank and scale at which methods are compared."""
        assert self.rank is not None
        assert self.alpha is not None
        return self.rank, self.alpha / self.rank


def parse_sweep(text: str) -> Sweep:
    """`auto`, or learning rates: `1e-4,3e-4`.

    Raises:
        SettingError: anything else.
    """
    if text == "auto":
        return Sweep()
    try:
        rates = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        rates = ()
    require(
        bool(rates) and all(0 < lr < float("inf") for lr in rates),
        f"--lr-sweep takes auto, or such as 1e-4,3e-4, not {text!r}",
    )
    return Sweep(rates)


@dataclasses.dataclass
class Study:
    """A comparison that is ready to run, or to be looked at."""

    comparison: Comparison
    out: Path
    arms: list[Arm]
    parts: split.Parts
    results: Results
    dtype: str

    @property
    def seeds(self) -> list[int]:
        """The same for every arm."""
        return list(range(self.comparison.seeds))

    def remaining(self) -> list[Trial]:
        """What can be run now, sweeps before seeds."""
        timed, sweep = self.comparison.spent.steps is None, self.comparison.sweeps
        found = [
            t
            for arm in self.arms
            for t in schedule.remaining(arm, self.results.rows, self.seeds, sweep, timed)
        ]
        return sorted(found, key=lambda t: (t.stage == SEED, self._tried(t.arm)))

    def expected(self) -> int:
        """About how many trials are left."""
        timed, sweep = self.comparison.spent.steps is None, self.comparison.sweeps
        return sum(
            schedule.expected(arm, self.results.rows, self.seeds, sweep, timed) for arm in self.arms
        )

    def steps(self, arm: str) -> int:
        """How many steps a trial of the arm has."""
        if self.comparison.spent.steps is not None:
            return self.comparison.spent.steps
        timing = next(
            (
                row
                for row in self.results.rows
                if row.trial.arm == arm and row.trial.stage == TIMING
            ),
            None,
        )
        return (
            self.comparison.spent.steps_in(timing.step_seconds)
            if timing and timing.step_seconds
            else trial.TIMED_STEPS
        )

    def job(self, what: Trial, device: str, threads: int) -> trial.TrialJob:
        """All that the trial's process needs."""
        arm = next(arm for arm in self.arms if arm.name == what.arm)
        steps = trial.TIMED_STEPS if what.stage == TIMING else self.steps(arm.name)
        fields = {**self.comparison.recipe, "dtype": self.dtype, **arm.recipe}
        fields |= {
            "columns": {},
            "format": self.parts.format,
        }  # the parts are written in their format's own columns
        recipe = Recipe(
            model=self.comparison.model, data=[str(self.out / DATA / split.TRAIN)], eval_data=str(self.out / DATA / split.TUNE),
            out=str(self.out / TRIALS / what.name), method=arm.words, settings=arm.settings(steps), lr=what.lr, steps=steps,
            seed=what.seed, save_every=0, labels=self.parts.labels, **fields,
        )  # fmt: skip
        report = str(self.out / DATA / split.REPORT)
        return trial.TrialJob(
            what,
            recipe,
            report,
            device,
            threads,
            keep=arm.name not in (arms_.FULL, arms_.BASE) and what.stage != TIMING,
        )

    def take(self, row: ResultRow) -> None:
        """Note how a trial ended, and clear away the adapters that are no longer the best of their arm."""
        if row.trial.stage == TIMING and row.status == DONE:
            steps = self.comparison.spent.steps_in(row.step_seconds)
            if steps < LEAST_STEPS:
                seconds = f"{row.step_seconds:.3g} s"
                why = f"the budget fits no trial: a step takes {seconds}, so {self.comparison.budget} is {steps} steps"
                row = dataclasses.replace(row, status=REFUSED, reason=why)
        self.results.add(row)
        kept = {kept.trial.name for kept in schedule.chosen(row.trial.arm, self.results.rows)}
        for other in self.results.rows:
            if other.trial.arm == row.trial.arm and other.trial.name not in kept:
                shutil.rmtree(self.out / TRIALS / other.trial.name, ignore_errors=True)

    def _tried(self, arm: str) -> int:
        return sum(row.trial.arm == arm for row in self.results.rows)


def prepare(comparison: Comparison, console: Console) -> Study:
    """Check everything that can be checked before a model is loaded, and make or read the output directory.

    Raises:
        LorakinError: whatever is wrong; if plain LoRA cannot run, or no method can, why.
    """
    out = paths.named(comparison.out, "--out")
    resumed = _check_out(comparison, out)
    asked, comparison = comparison, _within(comparison)
    recipe = comparison.base_recipe
    batch = recipe.batch_size * recipe.accumulate
    if resumed:
        saved = _saved(out)
        parts, dtype = saved.parts, str(saved.dtype)
    else:
        parts = split.split_into(
            out / DATA,
            comparison.data,
            comparison.eval_data,
            batch,
            _usable(comparison),
            recipe.columns,
            recipe.format,
        )
        dtype = resolve_dtype(recipe.dtype, classification=parts.labels is not None)
    arms = _arms(comparison, parts, dtype)
    if not resumed:
        content = {**_asked(asked), "parts": dataclasses.asdict(parts), "dtype": dtype}
        atomic.write(
            out, {SETTINGS: yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()}
        )
    study = Study(comparison, out, arms, parts, Results(out / RESULTS), dtype)
    left = f"; left out: {parts.left_out}" if parts.left_out else ""
    held = f"{parts.tune} to choose learning rates by, {parts.report} to report on{left}"
    console.print(labelled("data     ", f"{parts.train:,} rows to train on, {held}"))
    for arm in arms:
        if reason := schedule.refusal(arm, study.results.rows):
            console.print(labelled("left out ", f"{arm.title}: {reason}", "bold yellow"))
    return study


def _within(comparison: Comparison) -> Comparison:
    """The same with rows cut at what the model has places for; a longer --max-length is said once, not by every trial."""
    wanted = comparison.base_recipe.max_length
    length = row_length(places_of(config_of(comparison.model)), wanted)
    if length == wanted:
        return comparison
    if "max_length" in comparison.recipe:
        told = f"rows are cut at {length} tokens instead of {wanted}: {comparison.model} has no more positions"
        warnings.warn(told, LorakinWarning, stacklevel=2)
    return dataclasses.replace(comparison, recipe={**comparison.recipe, "max_length": length})


def _usable(comparison: Comparison) -> Callable[[DataRows], DataRows]:
    """Gives those rows that have something to learn from."""
    recipe, tokenizer = comparison.base_recipe, load_tokenizer(comparison.model)

    def usable(rows: DataRows) -> DataRows:
        if rows.is_classification:
            check_meant(recipe, rows)
            return rows
        use_template(tokenizer, recipe.chat_template, rows, recipe.template_args)
        return with_answers(rows, tokenizer, recipe.max_length, recipe.loss_on)

    return usable


def _asked(comparison: Comparison) -> dict[str, Any]:
    """The comparison as it was asked for, for its file; where it lies does not matter."""
    return {
        field.name: getattr(comparison, field.name)
        for field in dataclasses.fields(comparison)
        if field.name != "out"
    }


def _check_out(comparison: Comparison, out: Path) -> bool:
    """Whether the directory holds this comparison, begun before."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out} is a file, expected a directory")
    _check_links(out)
    if not (out / SETTINGS).is_file():
        if out.is_dir() and any(path.name not in (DATA, LOCK) for path in out.iterdir()):
            raise OutputError(
                f"--out {out} is not empty and holds no comparison; choose another directory"
            )
        return False
    saved = _saved(out).asked
    for name, value in _asked(comparison).items():
        if saved.get(name) != value:
            raise SettingError(
                f"--out {out} holds another comparison: there {name} is {shown(saved.get(name))}, here {value!r}; to go on "
                "with it, give the same options, else choose another --out"
            )
    return True


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What a comparison's file says: as it was asked for, its data's parts, and the dtype that was taken."""

    asked: dict[str, Any]
    parts: split.Parts
    dtype: Literal["float32", "bfloat16", "float16"]


def _saved(out: Path) -> _Saved:
    content = read_yaml(out / SETTINGS, "the comparison")
    try:
        asked: dict[str, Any] = fitted(dict[str, Any], content)
        return fitted(  # type: ignore[no-any-return]
            _Saved,
            {"parts": asked.pop("parts", None), "dtype": asked.pop("dtype", None), "asked": asked},
        )
    except Misfit as misfit:
        raise SettingError(f"{out / SETTINGS} is no comparison: {misfit}") from None


def _check_links(out: Path) -> None:
    """See that a comparison's directory, which may be a stranger's, holds no links: trials write and delete there."""
    there = [
        path
        for folder in (out, out / TRIALS, out / DATA)
        if folder.is_dir()
        for path in folder.iterdir()
    ]
    if links := [path for path in there if path.is_symlink()]:
        raise OutputError(
            f"--out {out}: {links[0]} is a link, which a comparison does not follow; put what it means there"
        )


def _arms(comparison: Comparison, parts: split.Parts, dtype: str) -> list[Arm]:
    """All arms, sized to the budget, those that this model cannot take refused."""
    steps, recipe = comparison.spent.steps or 10**6, comparison.base_recipe
    model = skeleton(comparison.model, dtype, parts.labels)
    targets: Any = recipe.targets[0] if len(recipe.targets) == 1 else recipe.targets
    where: dict[str, Any] = {
        "exclude": recipe.exclude,
        "layers": parse_layers(recipe.layers) if recipe.layers else None,
    }
    where["rank_above"] = recipe.rank_above
    found = arms_.arms_of(
        comparison.methods, comparison.size, steps, comparison.settings, comparison.dropout
    )
    paths: list[str] = []

    def count(method: Method) -> int:
        return trainable_parameters(model, method, targets, **where)

    for n, arm in enumerate(found):
        try:
            if comparison.spent.params is not None and not arm.refused:
                arm = arm.sized(count, comparison.spent.params, steps)
            if not arm.refused:
                adapter = adapt(
                    model, supposed(model, arm.method(steps), targets, **where), targets, **where
                )
                paths = paths or list(adapter.placement.methods)
                adapter.remove()
        except LorakinError as error:
            if arm.kind == arms_.REFERENCE:
                raise
            arm = dataclasses.replace(arm, refused=str(error))
        found[n] = arm
    if found[0].refused:
        raise SettingError(
            f"{found[0].title}, against which all others are measured, cannot run: {found[0].refused}"
        )
    limits = arms_.limits_of(found[0], paths, parts.labels is not None)
    return found + [_that_fits(arm, model, paths, comparison) for arm in limits]


def _that_fits(arm: Arm, model: Any, paths: Sequence[str], comparison: Comparison) -> Arm:
    """Full fine-tuning only where its weights, their copy, gradients and Adam's two moments find room."""
    if arm.name != arms_.FULL:
        return arm
    if comparison.spent.params is not None:
        return dataclasses.replace(
            arm,
            refused=f"it trains more than the {comparison.spent.params:,} numbers of the budget",
        )
    trained = sum(model.get_submodule(path).weight.numel() for path in paths)
    needed = 4 * (sum(p.numel() for p in model.parameters()) + 5 * trained)
    there = (
        torch.cuda.mem_get_info()[1]
        if torch.cuda.is_available()
        else psutil.virtual_memory().available
    )
    if needed > 0.8 * there:
        why = f"it does not fit: about {needed / 2**30:.1f} GiB without activations, of {there / 2**30:.1f} GiB"
        return dataclasses.replace(arm, refused=why)
    return arm


@contextlib.contextmanager
def locked(comparison: Comparison) -> Iterator[None]:
    """Hold the comparison's directory, so that no other process works in it.

    Raises:
        OutputError: another one does, or it cannot be made.
    """
    out = paths.named(comparison.out, "--out")
    _check_out(comparison, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = locks.hold(out / LOCK)
    except locks.LockTaken as error:
        raise OutputError(f"--out {out} is in use by another lorakin compare ({error})") from None
    except OSError as error:
        raise OutputError(f"--out {out} cannot be used: {error}") from error
    try:
        yield
    finally:
        lock.release()


def check_ran(study: Study) -> None:
    """See to it that something could be run.

    Raises:
        SettingError: no arm that trains could be run at all: each was refused, or all of its trials failed.
    """
    reasons = [_why_not(arm, study.results.rows) for arm in study.arms if arm.lr is not None]
    if all(reasons):
        raise SettingError(f"nothing could be run: {reasons[0]}")


def _why_not(arm: Arm, rows: Iterable[ResultRow]) -> str:
    mine = [row for row in rows if row.trial.arm == arm.name]
    if refused := schedule.refusal(arm, mine):
        return refused
    failed = bool(mine) and all(row.status == FAILED for row in mine)
    return f"every trial of {arm.title} failed: {mine[0].reason}" if failed else ""
