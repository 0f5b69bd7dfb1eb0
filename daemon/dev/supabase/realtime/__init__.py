"""A local stand-in for Supabase Realtime, as far as realtime-py and realtime-js call it.

It answers as the real server did when it was recorded (tests/dev/realtime_cases.json): broadcasts of the database and of
clients, private channels by the policies on `realtime.messages`, changes of published tables. It has no presence.
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

from daemon.dev.keys import Keys
from daemon.dev.realtime.changes import Changes
from daemon.dev.realtime.connections import Connection
from daemon.dev.realtime.frames import VERSIONS
from daemon.dev.realtime.messages import Messages
from daemon.dev.realtime.posts import Posts
from daemon.dev.realtime.rooms import Rooms
from daemon.dev.realtime.server import Server
from daemon.dev.realtime.tokens import TokenRefused, read

log = structlog.stdlib.get_logger()

PREFIX = "/realtime/v1"
DENIAL_DELAY = 5.0
"""Seconds that the real server takes to refuse a join to a private channel."""


@asynccontextmanager
async def realtime_app(
    dsn: str, pool: "asyncpg.Pool[asyncpg.Record]", keys: Keys, *, denial_delay: float = DENIAL_DELAY
) -> AsyncGenerator[Starlette]:
    """The stand-in, with all its routes below `/realtime/v1`; it hears for as long as the context lasts.

    Args:
        dsn: The database, as `postgres`: with REPLICATION, BYPASSRLS, and every API role to become.
        pool: Connections of the same role to the same database.
        keys: What opens it.
        denial_delay: See `DENIAL_DELAY`.
    """
    rooms = Rooms()
    messages, changes = Messages(dsn, pool, rooms), Changes(dsn, pool)
    server = Server(keys, pool, rooms, messages, changes, denial_delay)
    async with messages.listening():
        # No task group: it would wrap whatever ends the block, which is none of its business.
        followers = [asyncio.create_task(each.run(), name="realtime") for each in (messages, changes)]
        for each in followers:
            each.add_done_callback(_complain)
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
            said = error.short if key else "API key is missing"
            await websocket.send_denial_response(JSONResponse({"error": said}, 401))
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
    return Starlette(routes=[Mount(PREFIX, routes=routes)], exception_handlers={HTTPException: _not_here})


def _complain(follower: asyncio.Task[None]) -> None:
    """Says what nobody hears of any more, and why."""
    if not follower.cancelled() and (error := follower.exception()) is not None:
        log.error("realtime.deaf", error=str(error))


async def _not_here(request: Request, _: Exception) -> Response:
    """No such route, or not with this method."""
    return _not_implemented(f"{request.method} {request.url.path}")


def _not_implemented(what: str) -> Response:
    return JSONResponse({"message": f"image-jobs dev does not have {what}."}, 501)
