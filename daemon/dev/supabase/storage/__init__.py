"""A local stand-in for Supabase Storage, as far as storage3 and storage-js call it.

It answers as the real server did when it was recorded (tests/dev/storage_cases.json), quirks included, and with 501 to
everything else. Rows are in the schema `storage` of the database, where policies and migrations reach them.
"""

from pathlib import Path

import asyncpg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Mount

from daemon.dev.keys import Keys
from daemon.dev.storage.answers import StorageError, not_implemented
from daemon.dev.storage.buckets import Buckets
from daemon.dev.storage.files import Files
from daemon.dev.storage.objects import Objects
from daemon.dev.storage.reads import Reads
from daemon.dev.storage.rows import Rows

PREFIX = "/storage/v1"


def storage_app(pool: "asyncpg.Pool[asyncpg.Record]", directory: Path, keys: Keys) -> Starlette:
    """The stand-in, with all its routes below `/storage/v1`.

    Args:
        pool: Connections to a database with the schema `storage`, as a role that may become every API role.
        directory: Where the bytes go.
        keys: What opens it.
    """
    rows, files = Rows(pool), Files(directory)
    parts = (Buckets(rows, files, keys), Objects(rows, files, keys), Reads(rows, files, keys))
    # Starlette takes the first that fits: `/object/{bucket}/…` would take `/object/sign/…` for a bucket named "sign".
    routes = sorted((route for part in parts for route in part.routes), key=lambda r: r.path.startswith("/object/{"))
    return Starlette(
        routes=[Mount(PREFIX, routes=routes)],
        exception_handlers={StorageError: _say, HTTPException: _not_here, ClientDisconnect: _nobody_listens},
    )


async def _say(_: Request, error: Exception) -> Response:
    assert isinstance(error, StorageError)
    return error.answer()


async def _not_here(request: Request, _: Exception) -> Response:
    """No such route, or not with this method."""
    return not_implemented(f"{request.method} {request.url.path}").answer()


async def _nobody_listens(_: Request, __: Exception) -> Response:
    """The client went away in the middle of an upload."""
    return Response(status_code=499)
