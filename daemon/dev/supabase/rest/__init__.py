"""A local stand-in for Supabase's REST endpoint, as far as supabase-py and supabase-js call it.

It works as PostgREST does: each request is a transaction in the caller's role, and the messages and statuses of errors
are PostgREST's. Features that are missing return 501.

tables, calls         /<table> and /rpc/<function>
requests, grammar     headers and query parameters
bodies                JSON bodies
catalogue             tables and functions of the schema public
statements            SQL
transactions          role, claims, timeouts
results               responses
errors                error responses
"""

import asyncpg
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from daemon.dev.supabase.errors import error_handlers
from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.rest.calls import Calls
from daemon.dev.supabase.rest.errors import not_implemented
from daemon.dev.supabase.rest.tables import Tables

PREFIX = "/rest/v1"

_METHODS = ("GET", "HEAD", "POST", "PATCH", "DELETE", "PUT")


def rest_app(pool: "asyncpg.Pool[asyncpg.Record]", keys: Keys) -> Starlette:
    """Make the application, with all its routes below `/rest/v1`.

    Args:
        pool: Connections as `authenticator`, the role that may become every API role and is none of them.
        keys: Of the project.
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
                return not_implemented(f"{request.method} {request.url.path}").response()

    return Starlette(
        routes=[Mount(PREFIX, routes=[Route("/{path:path}", dispatch, methods=_METHODS)])],
        exception_handlers=error_handlers(not_implemented),
    )
