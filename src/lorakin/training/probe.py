"""Batches for methods that look at the data before they start."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from lorakin.adapting import importance
from lorakin.family import Method
from lorakin.storage import atomic
from lorakin.storage.summary import IMPORTANCE, importance_in
from lorakin.terminal import labelled
from lorakin.training import processes
from lorakin.training.batches import stratified_sample
from lorakin.training.run import PreparedRun
from lorakin.training.run_report import importance_table

Batch = dict[str, Tensor]


MOST_BATCHES = 256
"""The most batches for a member that sets itself no limit."""


def probe_batches(run: PreparedRun, share: float = 1.0, most: int | None = None) -> list[Batch]:
    """Returns batches of a random share of the run's training rows, on the model's device.

    The recipe's seed draws the rows, so a run and its resumption see the same ones. At least one
    row of each class is drawn. Batches have the recipe's batch size, and the tensors that the
    model's forward takes, with `labels`.

    Args:
        run: the run; its model is loaded and its rows are tokenised.
        share: the share of the training rows, in (0, 1].
        most: the most batches; None for as many as there are.
    """
    size = run.recipe.batch_size
    examples = stratified_sample(run.train.examples, share, run.recipe.seed)
    examples = examples if most is None else examples[: most * size]
    rows: Any = [run.task.probed(example) for example in examples]
    collate = run.task.probe_collator(run.loaded.model, run.loaded.tokenizer)
    loader: Any = DataLoader(rows, batch_size=size, collate_fn=collate)
    device = run.loaded.model.device
    return [{key: tensor.to(device) for key, tensor in batch.items()} for batch in loader]


def probe_loss(run: PreparedRun) -> Callable[[Any, Batch], Tensor]:
    """Returns the loss of a model on such a batch."""
    loss = run.task.loss

    def of_batch(model: Any, batch: Batch) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return loss(model(**inputs), batch.get("labels"), None)  # type: ignore[arg-type]

    return of_batch


def measured_by(run: PreparedRun, method: Method) -> dict[str, Any]:
    """Returns the arguments of `lorakin.adapt` for a method that starts by data; none for others.

    They are batches of the training rows, and the loss of a model on them.
    """
    member = method.measured_member
    if member is None:
        return {}
    batches = probe_batches(run, most=member.batches or MOST_BATCHES)
    needs = " and ".join(sorted(member.needs))
    line = f"{member.word} looks at {needs} on up to {len(batches)} batches before it starts"
    run.console.print(labelled("probe  ", line))
    return {"probe": batches, "loss": probe_loss(run)}


def measure_importance(
    run: PreparedRun, method: Method, where: Mapping[str, Any]
) -> dict[str, float]:
    """Returns each module's importance for a method with a probe; writes it into `run.out`.

    A resumed run takes what it measured before. With several processes, all take the first one's.

    Args:
        run: the run, before its adapter is placed.
        method: a method whose `probe` is not None.
        where: the arguments of `lorakin.adapt` that say which modules are adapted.

    Raises:
        OutputError: the importances cannot be written.
    """
    shares = processes.agreed(importance_in(run.out) or _measured(run, method, where))
    content = (json.dumps(shares, indent=1) + "\n").encode()
    processes.first_writes(lambda: atomic.write(run.out, {IMPORTANCE: content}))
    return shares


def _measured(run: PreparedRun, method: Method, where: Mapping[str, Any]) -> dict[str, float]:
    probe = method.needed_probe
    assert probe is not None
    batches = probe_batches(run, probe.sample)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    passes = f"{probe.epochs} passes over {rows} examples ({len(batches)} batches)"
    run.console.print(labelled("probe  ", f"{passes}: which modules matter?"))
    model, rate = run.loaded.model, run.recipe.lr
    shares = importance(model, method, batches, loss=probe_loss(run), lr=rate, **where)
    run.console.print(importance_table(method.with_importance(shares), shares))
    return shares
