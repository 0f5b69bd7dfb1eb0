"""A local stand-in for Supabase's REST endpoint, as far as supabase-py and supabase-js call it.

It does what PostgREST does: the database decides, each request is a transaction in the role of whoever asks, and the
words and statuses of errors are PostgREST's. What it does not have answers 501.
"""

import asyncpg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from daemon.dev.keys import Keys
from daemon.dev.rest.answers import RestError, not_implemented
from daemon.dev.rest.calls import Calls
from daemon.dev.rest.tables import Tables

PREFIX = "/rest/v1"

_METHODS = ("GET", "HEAD", "POST", "PATCH", "DELETE", "PUT")


def rest_app(pool: "asyncpg.Pool[asyncpg.Record]", keys: Keys) -> Starlette:
    """The stand-in, with all its routes below `/rest/v1`.

    Args:
        pool: Connections as `authenticator`, the role that may become every API role and is none of them.
        keys: What opens it.
    """
    tables, calls = Tables(pool, keys), Calls(pool, keys)

    async def dispatch(request: Request) -> Response:
        match request.method, *request.path_params["path"].split("/"):
            case ("POST" | "GET" | "HEAD", "rpc", name):
                return await calls.call(request, name)
            case ("GET" | "HEAD", name) if name:
                return await tables.read(request, name)
            case ("POST", name) if name:
                return await tables.insert(request, name)
            case ("PATCH", name) if name:
                return await tables.update(request, name)
            case ("DELETE", name) if name:
                return await tables.delete(request, name)
            case _:
                return await _not_here(request, None)

    return Starlette(
        routes=[Mount(PREFIX, routes=[Route("/{path:path}", dispatch, methods=_METHODS)])],
        exception_handlers={RestError: _say, HTTPException: _not_here, ClientDisconnect: _nobody_listens},
    )


async def _say(_: Request, error: Exception) -> Response:
    assert isinstance(error, RestError)
    return error.answer()


async def _not_here(request: Request, _: Exception | None) -> Response:
    """No such route, or not with this method."""
    return not_implemented(f"{request.method} {request.url.path}").answer()


async def _nobody_listens(_: Request, __: Exception) -> Response:
    """The client went away in the middle of a request."""
    return Response(status_code=499)
