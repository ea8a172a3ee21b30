"""Training on transformers' Trainer. Needs the `train` extra, but for what this file exports, which works with any Trainer."""

from lorakin.training.trainers import AdapterTraining, prepare_trainer

__all__ = ["AdapterTraining", "prepare_trainer"]
