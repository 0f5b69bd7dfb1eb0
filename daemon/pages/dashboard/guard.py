"""Keeps everybody but the operator's own page out: other sites, other names of this machine, requests without the token."""

import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Of every response, a refusal, too."""


class Guard:
    """Refuses, in front of an application, what does not come from its own page.

    Args:
        app: Whatever it may let in.
        prefix: Below which the application stands.
        token: That whatever is below `{prefix}/api/` is asked with, as `authorization: Bearer …`: never in an address, which logs
            keep, and never in a cookie, which a browser sends by itself.
    """

    def __init__(self, app: ASGIApp, prefix: str, token: str) -> None:
        self._app = app
        self._prefix = prefix
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with a refusal, or have the application do it."""

        if scope["type"] == "websocket":
            return await send({"type": "websocket.close"})

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope["method"], scope["path"], Headers(scope=scope))
        app = self._app if refusal is None else JSONResponse({"message": refusal[1], "hint": ""}, refusal[0])
        return await app(scope, receive, send_guarded)

    def _refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """Return status and sentence of the refusal; None if there is none."""
        host = headers.get("host", "")
        if _hostname(f"http://{host}") not in LOOPBACK:  # a name of others that leads here: DNS rebinding
            return 403, "The dashboard opens by its own address only: the one that was printed when it started."
        # Browsers send at least one of these with everything that a page of another site asks for.
        foreign = headers.get("origin", f"http://{host}") != f"http://{host}"
        opened = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if foreign or (headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not opened):
            return 403, "The dashboard takes no requests from other sites."
        if path.startswith(f"{self._prefix}/api/"):
            scheme, _, token = headers.get("authorization", "").partition(" ")
            if scheme != "Bearer" or not secrets.compare_digest(token.encode(), self._token):
                return (
                    401,
                    "This page does not have the token of the running dashboard: open the address that was printed.",
                )
        return None


def _hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
