"""A local stand-in for Supabase Realtime, as far as realtime-py and realtime-js call it.

It responds as the real server did when it was recorded (tests/dev/supabase/realtime_cases.json): broadcasts of the
database and of clients, private channels by the policies on `realtime.messages`, changes of published tables. It has no
presence.

server, connections   a client's WebSocket and its channels
rooms                 channels by topic
access, tokens        who may join
limits                a project's messages a second
messages, posts       broadcasts: from the database, over HTTP
changes, bindings     postgres_changes: who gets which change
wal                   the decoder of the replication stream
frames                the wire format
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.realtime.changes import Changes
from daemon.dev.supabase.realtime.connections import Connection
from daemon.dev.supabase.realtime.frames import VERSIONS
from daemon.dev.supabase.realtime.limits import RateLimit
from daemon.dev.supabase.realtime.messages import Messages
from daemon.dev.supabase.realtime.posts import Posts
from daemon.dev.supabase.realtime.rooms import Rooms
from daemon.dev.supabase.realtime.server import Server
from daemon.dev.supabase.realtime.tokens import TokenRefused, read

log = structlog.stdlib.get_logger()

PREFIX = "/realtime/v1"
DENIAL_DELAY = 5.0
"""Seconds that the real server takes to refuse a join to a private channel."""


@asynccontextmanager
async def realtime_app(
    dsn: str,
    pool: "asyncpg.Pool[asyncpg.Record]",
    keys: Keys,
    *,
    denial_delay: float = DENIAL_DELAY,
    messages_per_second: int | None = None,
) -> AsyncGenerator[Starlette]:
    """Make the application, with all its routes below `/realtime/v1`; it listens for as long as the context lasts.

    Args:
        dsn: The database, as `postgres`: with REPLICATION, BYPASSRLS, and every API role to become.
        pool: Connections of the same role to the same database.
        keys: Of the project.
        denial_delay: See `DENIAL_DELAY`.
        messages_per_second: The project's limit, beyond which messages are dropped silently; None for no limit.
    """
    limit = RateLimit(messages_per_second)
    rooms = Rooms(limit)
    messages, changes = Messages(dsn, pool, rooms), Changes(dsn, pool, limit)
    server = Server(keys, pool, rooms, messages, changes, denial_delay)
    async with messages.listening():
        # No task group: it would wrap the exception that ends the block.
        followers = [asyncio.create_task(each.run(), name="realtime") for each in (messages, changes)]
        for each in followers:
            each.add_done_callback(_log_failure)
        try:
            yield _app(server)
        finally:
            for each in followers:
                each.cancel()
            await asyncio.wait(followers)


def _app(server: Server) -> Starlette:
    async def connect(websocket: WebSocket) -> None:
        key = websocket.query_params.get("apikey") or websocket.headers.get("x-api-key") or ""
        version = VERSIONS.get(websocket.query_params.get("vsn", "1.0.0"))
        try:
            claims = read(server.keys, key)
        except TokenRefused as error:
            message = error.short if key else "API key is missing"
            await websocket.send_denial_response(JSONResponse({"error": message}, 401))
            return
        if version is None:
            await websocket.send_denial_response(_not_implemented("this version of the protocol"))
            return
        await websocket.accept()
        await Connection(server, websocket, version, claims).run()

    posts = Posts(server)
    routes = [
        WebSocketRoute("/websocket", connect),
        Route("/api/broadcast", posts.batch, methods=["POST"]),
        Route("/api/broadcast/{topic}/events/{event}", posts.single, methods=["POST"]),
    ]
    return Starlette(routes=[Mount(PREFIX, routes=routes)], exception_handlers={HTTPException: _no_route})


def _log_failure(follower: asyncio.Task[None]) -> None:
    """Log why broadcasts or changes are no longer sent."""
    if not follower.cancelled() and (error := follower.exception()) is not None:
        log.error("realtime.stopped", error=str(error))


async def _no_route(request: Request, _: Exception) -> Response:
    """No such route, or not with this method."""
    return _not_implemented(f"{request.method} {request.url.path}")


def _not_implemented(what: str) -> Response:
    return JSONResponse({"message": f"image-jobs dev does not have {what}."}, 501)
