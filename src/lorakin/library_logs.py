"""Keeps libraries from logging what no user can act on."""

from __future__ import annotations

import logging
import os
import sys

CHATTY = ("bitsandbytes", "torchao", "torch.utils._pytree", "DeepSpeed")
"""Libraries that warn of every cast of every layer, or of what they cannot load on import."""


def calm_libraries() -> None:
    """Shows only errors of `CHATTY`; undoes `let_libraries_log`."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
        # One of them sets its level again, and writes to stdout, where results go.
        logging.getLogger(name).addFilter(_is_serious)


def let_libraries_log() -> None:
    """Shows what all libraries log."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET)
        logging.getLogger(name).removeFilter(_is_serious)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    os.environ["TRANSFORMERS_VERBOSITY"] = "info"  # it is read when transformers is imported


def _is_serious(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
