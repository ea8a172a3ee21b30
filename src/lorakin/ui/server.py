"""Serves the page: on loopback, without telemetry, and to nobody else's pages."""

from __future__ import annotations

import hmac
import ipaddress
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakin.errors import OutputError, SettingError
from lorakin.ui import warm

PORT, TRIED = 7860, 100
"""Gradio's usual port, and how many are tried from it on."""
GRACE = 2
"""Seconds for open requests when the server ends; after as many again the process ends."""


def check_host(host: str, password: str | None) -> None:
    """Checks that strangers cannot use the page.

    >>> check_host("127.0.0.1", None)

    Raises:
        SettingError: the host is not loopback, and there is no password.
    """
    if password is not None and not password:
        raise SettingError("--password is empty; give one that cannot be guessed")
    if password is None and not _is_loopback(host):
        raise SettingError(
            f"--host {host} lets other machines use this page, which starts programs here: "
            "give a --password, too"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listening(host: str, port: int | None) -> socket.socket:
    """Returns a socket that listens on a port; without one, on 7860 or the next that is free.

    Raises:
        OutputError: the port is taken, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for tried in [port] if port is not None else range(PORT, PORT + TRIED):
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, tried))
            listener.listen(128)
        except OSError as error:
            listener.close()
            reason = error.strerror or str(error)
        else:
            return listener
    where = f"--port {port}" if port is not None else f"ports {PORT} to {PORT + TRIED - 1}"
    raise OutputError(f"cannot listen on {where} of --host {host}: {reason}")


def app_of(runs: Path, host: str, password: str | None, scratch: str) -> Any:
    """Returns the web application: the page behind the check of origins and the password.

    Args:
        runs, host, password: as for `serve`.
        scratch: a directory of this process, where Gradio puts what is uploaded.
    """
    # Gradio reads these when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = scratch
    import fastapi
    import gradio as gr

    from lorakin.ui import page
    from lorakin.ui.origin import OriginCheck

    def is_known(user: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (password or "").encode())

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(OriginCheck, host=host)
    return gr.mount_gradio_app(
        app, page.build(runs), path="/", theme=page.theme(), css=page.CSS, ssr_mode=False,
        footer_links=[], show_error=True, auth=is_known if password is not None else None,
        enable_monitoring=False,
        run_history=False,  # else the browser keeps every call, and becomes slow
    )  # fmt: skip


def serve(
    runs: Path,
    host: str,
    port: int | None,
    password: str | None,
    ready: Callable[[str], None],
    opens_browser: bool,
) -> None:
    """Serves the page until it is interrupted.

    Args:
        runs: the folder where run directories are listed and made.
        host, port: where to listen; None for the port takes the next that is free.
        password: what a browser must know, if it is not None.
        ready: is told the page's address once it can be opened.
        opens_browser: whether to open it in a browser, too.

    Raises:
        SettingError: a host that is not loopback, without a password.
        OutputError: the folder or the port cannot be used.
    """
    import uvicorn

    check_host(host, password)
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--runs {runs} cannot be made: {error.strerror or error}") from error
    with listening(host, port) as listener, tempfile.TemporaryDirectory() as scratch:
        app = app_of(runs, host, password, scratch)
        # An open page's stream is cut off at the end, which uvicorn would log as an error.
        config = uvicorn.Config(
            app, log_level="critical", lifespan="on", timeout_graceful_shutdown=GRACE
        )
        server = uvicorn.Server(config)
        shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"

        def announce() -> None:
            while not server.started:
                time.sleep(0.02)
            ready(address)
            if opens_browser:
                webbrowser.open(address)
            warm.begin()

        def cut_short() -> None:
            while not server.should_exit:
                time.sleep(0.1)
            time.sleep(2 * GRACE)
            # A plan or an answer is still being computed, and nobody waits for it. Runs are
            # processes of their own.
            shutil.rmtree(scratch, ignore_errors=True)
            os._exit(128 + signal.SIGINT)

        for beside in (announce, cut_short):
            threading.Thread(target=beside, daemon=True).start()
        server.run(sockets=[listener])
