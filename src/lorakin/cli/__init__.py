"""The command `lorakin`: one small file per command."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Runs the command line and ends the process with an exit code.

    0 done, 1 a bug or a missing extra, 2 bad input, 3 diverged, 4 not the same model, 130
    interrupted.
    """
    # SystemExit unwinds the stack, so that whatever is open is cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of the libraries below; ours is rich's
    try:
        from lorakin.cli.app import run

        code = run(sys.argv[1:])
    except ImportError as error:  # commands import what they need when they run
        sys.exit(
            f"lorakin's command needs more than its core ({error}); install it with: pip install "
            "'lorakin[train]'"
        )
    sys.exit(code)
