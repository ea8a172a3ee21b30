"""Measures a training step without the optimizer: forward and backward over the frozen base's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

import lorakin as lk
from benchmarks.measure import interleaved, ratio, saved_bytes
from benchmarks.subjects import SUBJECTS, Decoder, Subject, batch, ours, theirs, twin

Inputs = tuple[torch.Tensor, torch.Tensor]


def forward_of(model: Any, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Returns a function that computes the loss. Its input wants gradients, as in a deep model."""
    x, weights = inputs
    return lambda: model(x.detach().requires_grad_(), weights)["loss"]


def step_of(
    model: Any, inputs: Inputs, after: Callable[[], Any] | None = None
) -> Callable[[], None]:
    """Returns a function that runs forward, backward, and then `after`."""
    forward = forward_of(model, inputs)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        forward().backward()
        if after is not None:
            after()
        for parameter in trained:
            parameter.grad = None

    return step


def compared(
    base: Decoder, subject: Subject
) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """Returns the models of one subject by variant, and what they do after their backward."""
    model, adapter = ours(base, subject)
    models, after = {"frozen": base, "lorakin": model}, {}
    if subject.acts:
        optimizer = adapter.optimizer(torch.optim.SGD, lr=0.0, total_steps=10_000)
        after["lorakin"] = lambda: (adapter.run.before_step(), adapter.run.after_step(optimizer))
    if subject.theirs is not None:
        for name, narrow in (("PEFT", False), ("PEFT narrow", True)):
            models[name] = peer = theirs(base, subject, narrow)
            if subject.acts:
                after[name] = _allocating(peer)
    if subject.name == "lora":
        models["lorakin fused"] = twin(model)
        lk.fuse(models["lorakin fused"])
        models["full fine-tuning"] = copy.deepcopy(base).requires_grad_(True)
    return models, after


def _allocating(peer: Any) -> Callable[[], Any]:
    steps = iter(range(1, 10_000))
    return lambda: peer.base_model.update_and_allocate(next(steps))


def measure(
    base: Decoder, names: Sequence[str], rounds: int, length: int = 256, rows: int = 4
) -> list[dict[str, Any]]:
    """Returns a row for each variant of each member.

    It has the time, by clock, and the bytes that autograd keeps, both over the frozen base's.
    """
    inputs, table = batch(base, rows, length), []
    for name in names:
        models, after = compared(base, SUBJECTS[name])
        steps = {key: step_of(model, inputs, after.get(key)) for key, model in models.items()}
        seconds = interleaved(steps, rounds, inputs[0].device.type)
        kept = {key: saved_bytes(model, forward_of(model, inputs)) for key, model in models.items()}
        for key in list(models)[1:]:
            spreads = {clock: ratio(seconds[clock], key, "frozen") for clock in seconds}
            table.append(
                {
                    "member": name,
                    "variant": key,
                    **spreads,
                    "saved": round(kept[key] / kept["frozen"], 3),
                }
            )
            print(f"{name}, {key}: {spreads['thread']}, saved {table[-1]['saved']:.2f}", flush=True)
    return table


def compiled(
    base: Decoder, names: Sequence[str], rounds: int, length: int = 256, rows: int = 4
) -> list[dict[str, Any]]:
    """Returns a row for each variant under torch.compile, over the frozen base under it."""
    inputs, table = batch(base, rows, length), []
    for name in names:
        models, after = compared(base, SUBJECTS[name])
        steps = {}
        for key in ("frozen", "lorakin", "PEFT"):
            torch._dynamo.reset()
            model = torch.compile(models[key], fullgraph=key != "PEFT")
            steps[key] = step_of(model, inputs, after.get(key))
            for _ in range(3):
                steps[key]()
        seconds = interleaved(steps, rounds, inputs[0].device.type)
        pairs = {"lorakin": ("lorakin", "frozen"), "PEFT": ("PEFT", "frozen")}
        pairs["lorakin ÷ PEFT"] = "lorakin", "PEFT"
        for key, (over, under) in pairs.items():
            spreads = {clock: ratio(seconds[clock], over, under) for clock in seconds}
            table.append({"member": name, "variant": key, **spreads})
            print(f"{name}, {key}: {spreads['thread']}", flush=True)
    return table


def accuracy(
    base: Decoder, names: Sequence[str], length: int = 64, rows: int = 2
) -> list[dict[str, Any]]:
    """Returns ‖g − g64‖ / ‖g64‖ over all trained tensors, with g64 the gradient in float64."""
    inputs, table = batch(base, rows, length), []
    for name in (name for name in names if "dropout" not in name):  # its masks differ
        models, _ = compared(base, SUBJECTS[name])
        for key in ("lorakin", "PEFT", "PEFT narrow"):
            if key not in models:
                continue
            exact = _gradients(
                copy.deepcopy(models[key]).double(), tuple(t.double() for t in inputs)
            )
            got = _gradients(models[key], inputs)
            error = torch.cat(
                [(g.double() - e).flatten() for g, e in zip(got, exact, strict=True)]
            ).norm()
            table.append(
                {
                    "member": name,
                    "variant": key,
                    "error": float(error / torch.cat([e.flatten() for e in exact]).norm()),
                }
            )
            print(f"{name}, {key}: gradient error {table[-1]['error']:.4f}", flush=True)
    return table


def _gradients(model: Any, inputs: Any) -> list[torch.Tensor]:
    forward_of(model, inputs)().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found
