"""Serves the dashboard on a port of this machine, until a signal."""

import asyncio
import errno
import secrets
import socket
from collections.abc import Callable

import uvicorn

from daemon.errors import ImageJobsError, Misconfigured
from daemon.pages.dashboard import PREFIX, dashboard_app
from daemon.pages.dashboard.guard import LOOPBACK


def new_token() -> str:
    """Return a token for one start of the server: whoever has it may do what an operator may."""
    return secrets.token_urlsafe(32)


def serve(dsn: str, *, host: str, port: int, opened: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        dsn: Of the database; it may be away.
        host: 127.0.0.1, localhost or ::1.
        port: A port that is free.
        opened: Is called with the page's address once it can be opened.

    Raises:
        Misconfigured: If `host` is not of this machine alone.
        ImageJobsError: If the port is taken or not allowed.
    """
    if host not in LOOPBACK:
        raise Misconfigured(
            f"The dashboard listens on this machine only, not on {host}: it may requeue, cancel and pause.",
            f"Leave --host out; from afar, use ssh -L {port}:127.0.0.1:{port} and open the printed address.",
        )
    token = new_token()
    with _listen(host, port) as listening:
        opened(f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}{PREFIX}#{token}")
        asyncio.run(_serve(dsn, token, listening))


async def _serve(dsn: str, token: str, listening: socket.socket) -> None:
    async with dashboard_app(dsn, token) as app:
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
        await uvicorn.Server(config).serve(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        listening.close()
        reason = "it is taken" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ImageJobsError(f"Port {port} cannot be used: {reason}.", "Choose another one with --port.") from error
    return listening
