"""Runs an engine in the foreground."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time

from lorakin.errors import OutputError
from lorakin.serving.serve import Served

SECONDS = 120
"""How long a server may take until it answers, if commands wait for that."""


def run(served: Served) -> int:
    """Runs the engine until it ends, and returns its exit code; ends it when interrupted.

    Raises:
        OutputError: it cannot be started, or does not answer.
    """
    program = served.engine.located()
    assert program is not None, served.engine.name
    words = [*program, *served.command[len(served.engine.program.split()) :]]
    environment = {**os.environ, **served.environment}
    if served.afterwards and _answers(served.launch.host, served.launch.port):
        _run_afterwards(served, environment)  # a server that runs already, as a service does
        return 0
    try:
        process = subprocess.Popen(words, cwd=served.out, env=environment)
    except OSError as error:
        raise OutputError(f"{words[0]} cannot be started: {error.strerror}") from error
    try:
        if served.afterwards:
            _wait(served, process)
            _run_afterwards(served, environment)
        return process.wait()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        _end(process)


def _answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def _wait(served: Served, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS
    while not _answers(served.launch.host, served.launch.port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise OutputError(
                f"{served.engine.name} does not answer on {served.launch.host}:"
                f"{served.launch.port}; what it printed says why"
            )
        time.sleep(0.2)


def _run_afterwards(served: Served, environment: dict[str, str]) -> None:
    for words in served.afterwards:
        if subprocess.run(words, cwd=served.out, env=environment).returncode:
            raise OutputError(f"{' '.join(words)} failed; what it printed says why")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
