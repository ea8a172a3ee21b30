"""Refuses requests that other sites' pages make: they could start a run otherwise."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'"
)
"""The page loads nothing from elsewhere, and no other page may show it in a frame."""


def host_of(address: str) -> str:
    """Returns the host of `host:port`, in lower case and without brackets.

    >>> host_of("LocalHost:7860"), host_of("[::1]:80"), host_of("::1")
    ('localhost', '::1', '::1')
    """
    address = address.strip().lower()
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]


def is_own_name(host: str, names: frozenset[str]) -> bool:
    """Returns whether a host is this machine's, so that no stranger's name server chose it.

    >>> is_own_name("127.0.0.1", frozenset()), is_own_name("evil.example", frozenset())
    (True, False)
    """
    if host == "localhost" or host in names:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class OriginCheck:
    """An ASGI middleware: a request must name this server as its host, and come from its page.

    Args:
        app: what answers the requests.
        host: the name that the user gave with `--host`.
    """

    def __init__(self, app: Any, host: str) -> None:
        self.app = app
        self.names = frozenset({host.lower(), socket.gethostname().lower()})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 403 to a stranger, and lets the app answer others."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        if (reason := self.refusal(headers)) is not None:
            await _refuse(scope, send, reason)
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"same-origin"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self.app(scope, receive, send_with_policy)

    def refusal(self, headers: dict[str, str]) -> str | None:
        """Returns why a request is refused; None if it is not.

        Args:
            headers: its headers, their names in lower case.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        if not is_own_name(host_of(host), self.names):
            return f"this server is not {host}"
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return f"pages of {origin} may not use this server"
        is_strange = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if is_strange and headers.get("sec-fetch-mode") != "navigate":
            return "other sites' pages may not use this server"
        return None


async def _refuse(scope: Scope, send: Send, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": reason[:100]})
        return
    kind = (b"content-type", b"text/plain; charset=utf-8")
    await send({"type": "http.response.start", "status": 403, "headers": [kind]})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
