"""One port for all endpoints, and the server behind it, in the caller's event loop."""

import asyncio
import errno
import socket
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from urllib.parse import urlsplit

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from daemon.errors import ImageJobsError
from daemon.running_dev import running

EXPOSED = ("content-range", "content-location", "preference-applied", "retry-after", "x-supabase-api-version")
"""Headers of responses that a page may read besides the safelisted ones (CORS)."""


def one_port(apps: Mapping[str, ASGIApp]) -> ASGIApp:
    """Combine applications into one, each below its prefix. Pages of every origin may call them, as with Supabase.

    Args:
        apps: By prefix, for example `/rest/v1`; each gets the whole path.
    """

    async def gateway(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path == "/":
            return await RedirectResponse("/canvas")(scope, receive, send)
        for prefix, app in apps.items():
            if path == prefix or path.startswith(f"{prefix}/"):
                return await app(scope, receive, send)
        return await JSONResponse({"message": f"image-jobs dev does not have {path}."}, 501)(scope, receive, send)

    return CORSMiddleware(
        gateway,
        allow_origins=["*"],
        allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
        allow_headers=["*"],
        expose_headers=EXPOSED,
    )


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals to dev."""
        yield


def listen(port: int) -> socket.socket:
    """Listen on a port of 127.0.0.1, before other parts are started.

    Raises:
        ImageJobsError: If the port is taken or not allowed.
    """
    # With its protocol named, asyncio sends at once; else a response's body waits 40 ms for the client's delayed ACK.
    listening = socket.socket(proto=socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno != errno.EADDRINUSE:
            raise ImageJobsError(
                f"Port {port} cannot be used ({error.strerror}).", "Choose another one with --port."
            ) from error
        raise _taken(port) from error
    return listening


def _taken(port: int) -> ImageJobsError:
    """Make the error for a port that is taken: by which program, and what to type."""
    beside = next((other for other in range(port + 10, min(port + 500, 65536), 10) if is_free(other)), None)
    choose = (
        "choose another port with --port" if beside is None else f"choose another port: image-jobs dev --port {beside}"
    )
    for dev in running():
        if urlsplit(dev.url).port == port:
            return ImageJobsError(
                f"Port {port} is taken by another image-jobs dev, process {dev.pid}, with its data in {dev.data}.",
                f"Use that one, which is at {dev.url}, stop it, or {choose}.",
            )
    return ImageJobsError(
        f"Port {port} is taken by another program.",
        f"Stop that program (that of the Supabase CLI with: supabase stop), or {choose}.",
    )


def is_free(port: int) -> bool:
    """Whether a port of 127.0.0.1 can be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


@asynccontextmanager
async def serving(app: ASGIApp, listening: socket.socket) -> AsyncGenerator[None, None]:
    """Serve an application for as long as the context lasts; requests in flight then have a second to end."""
    server = _Server(
        uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    )
    task = asyncio.create_task(
        server.serve(sockets=[listening]), name="api"
    )  # the socket listens already: no connection is refused
    try:
        yield
    finally:
        server.should_exit = True
        await task
