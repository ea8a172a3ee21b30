"""The names of the files in a run's directory."""

from __future__ import annotations

RECIPE, CHECKPOINTS, LOCK = "recipe.yaml", "checkpoints", ".lock"
METRICS, PICTURE = "metrics.jsonl", "loss.png"
LOG = "log.txt"
"""What a run prints that `lorakin ui` started."""
REQUEST = ".request"
"""What another process asks of the run that is at work there."""
