"""A local stand-in for Supabase Storage, as far as storage3 and storage-js call it.

It responds as the real server did when it was recorded (tests/dev/supabase/storage_cases.json), quirks included, and with
501 to everything else. Rows are in the schema `storage` of the database, where policies and migrations apply to them.

buckets           /bucket
objects, reads    /object: writes and lists; downloads, signed URLs, infos
requests          token, key and body of a request
files             the bytes
rows              the tables
errors            error responses
"""

from pathlib import Path

import asyncpg
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from daemon.dev.supabase.errors import error_handlers
from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.storage.buckets import Buckets
from daemon.dev.supabase.storage.errors import no_transformations, not_implemented
from daemon.dev.supabase.storage.files import Files
from daemon.dev.supabase.storage.objects import Objects
from daemon.dev.supabase.storage.reads import Reads
from daemon.dev.supabase.storage.rows import Rows

PREFIX = "/storage/v1"


def storage_app(pool: "asyncpg.Pool[asyncpg.Record]", directory: Path, keys: Keys) -> Starlette:
    """Make the application, with all its routes below `/storage/v1`.

    Args:
        pool: Connections to a database with the schema `storage`, as a role that may become every API role.
        directory: Of the bytes.
        keys: Of the project.
    """
    rows, files = Rows(pool), Files(directory)
    parts = (Buckets(rows, files, keys), Objects(rows, files, keys), Reads(rows, files, keys))
    # Starlette takes the first that fits: `/object/{bucket}/…` would take `/object/sign/…` for a bucket named "sign".
    routes = sorted((route for part in parts for route in part.routes), key=lambda r: r.path.startswith("/object/{"))

    async def render(request: Request) -> Response:
        """Refuse as a server does whose image transformations are off, as on a free project."""
        query = f"?{request.url.query}" if request.url.query else ""
        raise no_transformations(request.method, f"{request.url.path.removeprefix(PREFIX)}{query}")

    return Starlette(
        routes=[Mount(PREFIX, routes=[*routes, Route("/render/{path:path}", render)])],
        exception_handlers=error_handlers(not_implemented),
    )
