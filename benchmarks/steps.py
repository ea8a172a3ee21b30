"""The cost of a training step without optimizer: forward and backward, over those of the frozen base alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measure import Spread, interleaved, ratio, saved_bytes
from benchmarks.subjects import SUBJECTS, Decoder, Subject, batch, ours, theirs

Inputs = tuple[torch.Tensor, torch.Tensor]


def forward_of(model: Any, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """A call that gives the loss, with gradients wanted at the input, as inside a deeper model."""
    x, weights = inputs
    return lambda: model(x.detach().requires_grad_(), weights).loss


def step_of(
    model: Any, inputs: tuple[torch.Tensor, torch.Tensor], after: Callable[[], Any] = lambda: None
) -> Callable[[], None]:
    """A call that goes forward and backward and then does what belongs to the step."""
    forward = forward_of(model, inputs)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        forward().backward()
        after()
        for parameter in trained:
            parameter.grad = None

    return step


def compared(
    base: Decoder, subject: Subject, inputs: tuple[torch.Tensor, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The models of one comparison, and what each does after its backward."""
    model, adapter = ours(base, subject)
    models, after = {"frozen": base, "lorakin": model}, {}
    if subject.acts:
        optimizer = adapter.optimizer(torch.optim.SGD, lr=0.0, total_steps=10_000)
        after["lorakin"] = lambda: (adapter.before_step(), adapter.after_step(optimizer))
    if subject.theirs is not None:
        for name, narrow in (("peft", False), ("peft narrow", True)):
            models[name] = peer = theirs(base, subject, narrow)
            if subject.acts:
                after[name] = _allocating(peer)
    if subject.name == "lora":
        models["full"] = copy.deepcopy(base).requires_grad_(True)
    return models, after


def _allocating(peer: Any) -> Callable[[], None]:
    steps = iter(range(1, 10_000))
    return lambda: peer.base_model.update_and_allocate(next(steps))


def measure(base: Decoder, names: Sequence[str], rounds: int, length: int = 256, rows: int = 4) -> list[dict[str, Any]]:
    """One row for each variant of each member: time over the frozen base, by clock, and bytes saved over it."""
    inputs, table = batch(base, rows, length), []
    device = str(inputs[0].device.type)
    for name in names:
        models, after = compared(base, SUBJECTS[name], inputs)
        seconds = interleaved(
            {key: step_of(m, inputs, after.get(key, lambda: None)) for key, m in models.items()}, rounds, device
        )
        bytes_ = {key: saved_bytes(m, forward_of(m, inputs)) for key, m in models.items()}
        for key in models:
            if key != "frozen":
                spreads: dict[str, Spread] = {clock: ratio(seconds[clock], key, "frozen") for clock in seconds}
                table.append({"member": name, "variant": key, **spreads, "saved": bytes_[key] / bytes_["frozen"]})
                print(name, key, spreads["thread"], "wall", spreads["wall"], f"saved {table[-1]['saved']:.3f}", flush=True)
    return table
