"""The port of the local Supabase endpoints, and the server behind it, in the event loop of whoever starts it."""

import asyncio
import errno
import socket
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from daemon.errors import ImageJobsError

EXPOSED = ("content-range", "content-location", "preference-applied", "retry-after")
"""Headers of answers that a page in a browser may read besides the usual ones."""


def one_port(apps: Mapping[str, ASGIApp]) -> ASGIApp:
    """All of them in one, each below its prefix, for pages from anywhere, as Supabase's gateway lets them.

    Args:
        apps: By prefix, for example `/rest/v1`; each sees the whole path.
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
        """Leaves the signals to dev."""
        yield


def listen(port: int) -> socket.socket:
    """Takes a port of 127.0.0.1, before anything is started that would have to be stopped again.

    Raises:
        ImageJobsError: If it cannot be had.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen()
    except OSError as error:
        listening.close()
        taken = error.errno == errno.EADDRINUSE
        raise ImageJobsError(
            f"Port {port} is taken by another program." if taken else f"Port {port} cannot be used ({error.strerror}).",
            "Stop that program, or choose another port with --port." if taken else "Choose another one with --port.",
        ) from error
    return listening


@asynccontextmanager
async def serving(app: ASGIApp, listening: socket.socket) -> AsyncGenerator[None, None]:
    """Serves an application for as long as the context lasts; requests in flight then have a second to end."""
    server = _Server(
        uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    )
    task = asyncio.create_task(server.serve(sockets=[listening]), name="api")  # it listens already: nobody is refused
    try:
        yield
    finally:
        server.should_exit = True
        await task
