"""Adapters beside a base sharded over processes (FSDP2): each process holds them whole.

The code that shards the base must leave the adapter out (`ignored_params`). Its tensors are small,
and members need whole ones: they compare ranks over the model, share pairs between layers, make
anchors in the middle of a run. So nothing else averages their gradients over the processes. It is
done here, once at the end of each backward, before anything uses them.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from lorakin.errors import StateError
from lorakin.family.sharding import is_distributed, several_processes
from lorakin.inject.attachments import base_parameters
from lorakin.inject.inserted import InsertedAdapter
from lorakin.inject.run import CALLBACKS, AdapterCallback


class GradientAverage:
    """Averages an adapter's gradients over all processes at the end of each backward.

    Whether the base is sharded shows when the first gradients are there: it is often sharded after
    the optimizer was made. If it is not, DDP averages, and this stops.
    """

    def __init__(self, adapter: InsertedAdapter) -> None:
        self.adapter = weakref.ref(adapter)
        self.parameters = list({id(p): p for _, p in adapter.tensors.trained()}.values())
        self.is_due = False
        self.hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.parameters]  # type: ignore[no-untyped-call]

    def _arrived(self, parameter: Tensor) -> None:
        if not self.is_due:
            self.is_due = True
            Variable._execution_engine.queue_callback(self.average)

    @torch.no_grad()
    def average(self) -> None:
        """Replaces every gradient by its mean; with accumulation, means of means are the mean."""
        self.is_due = False
        adapter = self.adapter()
        if adapter is None or not _base_is_sharded(adapter.model):
            # DDP averages.
            self.stop()
            return
        check_whole(adapter)
        for dtype in dict.fromkeys(p.dtype for p in self.parameters):
            # Tensors without a gradient here too, so that processes agree on the sizes.
            parameters = [p for p in self.parameters if p.dtype == dtype]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            has_grad = torch.tensor(
                [float(p.grad is not None) for p in parameters],
                dtype=dtype,
                device=parameters[0].device,
            )
            flat = torch.cat([*(grad.flatten() for grad in grads), has_grad])
            torch.distributed.all_reduce(flat)
            sizes = [*(p.numel() for p in parameters), len(parameters)]
            *means, has_grad = torch.split(flat / torch.distributed.get_world_size(), sizes)
            for parameter, mean, anywhere in zip(parameters, means, has_grad.tolist(), strict=True):
                # Also where this process did not use the tensor.
                if anywhere:
                    parameter.grad = mean.view_as(parameter).clone()

    def stop(self) -> None:
        """Stops averaging."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


_AVERAGES: weakref.WeakKeyDictionary[InsertedAdapter, GradientAverage] = weakref.WeakKeyDictionary()


class GradientAveraging(AdapterCallback):
    """Averages the gradients of each adapter that several processes train."""

    def begins(self, adapter: InsertedAdapter) -> None:
        """Starts to average again: the run may train other tensors than the one before."""
        if adapter in _AVERAGES:
            _AVERAGES.pop(adapter).stop()
        if several_processes():
            _AVERAGES[adapter] = GradientAverage(adapter)

    def before_backward(self, adapter: InsertedAdapter) -> None:
        """Starts to average gradients that come before any optimizer is known."""
        trains = any(True for _ in adapter.tensors.trained())
        if trains and adapter not in _AVERAGES and several_processes():
            _AVERAGES[adapter] = GradientAverage(adapter)

    def before_first_step(self, adapter: InsertedAdapter) -> None:
        """Refuses an adapter that was itself sharded."""
        if adapter in _AVERAGES:
            check_whole(adapter)


CALLBACKS.append(GradientAveraging())


def average_now(adapter: InsertedAdapter) -> None:
    """Averages the gradients that are there, if several processes train."""
    if adapter in _AVERAGES:
        _AVERAGES[adapter].average()


def check_whole(adapter: InsertedAdapter) -> None:
    """Checks that the adapter itself was not sharded.

    Raises:
        StateError: it was.
    """
    if any(is_distributed(parameter) for _, parameter in adapter.tensors.trained()):
        raise StateError(
            f"adapter {adapter.name!r} was sharded together with the base, but its method needs "
            "whole tensors: shard with fully_shard(…, ignored_params=set(adapter.parameters())); "
            "with Accelerate, set accelerator.state.fsdp_plugin.ignored_modules = "
            "adapter.tensors.modules() before prepare(); lorakin.training.prepare_trainer does it "
            "for transformers' Trainer"
        )


def _base_is_sharded(model: nn.Module) -> bool:
    return any(is_distributed(parameter) for _, parameter in base_parameters(model))
