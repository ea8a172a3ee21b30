"""Training on transformers' Trainer. Needs the `train` extra, but for what this file exports, which works with any Trainer."""

from lorakin.training.checkpoints import AdapterCheckpoints, adapter_checkpoints

__all__ = ["AdapterCheckpoints", "adapter_checkpoints"]
