"""The page at `/canvas` and its session: the page belongs to the first workflow's member, and signs nobody in.

Beside this file lie the page's sources; `build.py` bundles them into `dist/` while the package is built.
"""

import time
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from daemon.dev.supabase.keys import Keys
from daemon.pages.files import NO_CACHE, BundledFiles

PREFIX = "/canvas"
WORKFLOW = UUID("00000000-0000-4000-8000-000000000001")
"""The first workflow of a data directory."""
VISITOR = UUID("00000000-0000-4000-8000-000000000002")
"""The user of the page's session; the first member of `WORKFLOW`."""

DIST = Path(__file__).with_name("dist")
LEFT_OUT = "The canvas was left out of this installation. Install again without IMAGE_JOBS_SKIP_CANVAS."

_PROMPT = "A red fox in a birch wood, first snow, morning light"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SESSION = 3600
"""Seconds, as a session of Supabase lasts; the page asks for the next one by itself."""


def canvas_app(keys: Keys, directory: Path = DIST) -> Starlette:
    """Serve the page below `/canvas`, and its session.

    Args:
        keys: To sign the session.
        directory: Of the bundle.
    """

    async def session(request: Request) -> Response:
        _check_origin(request)
        user = request.query_params.get("as", str(VISITOR))
        try:
            subject = str(UUID(user))
        except ValueError:
            raise HTTPException(400, "as must be a uuid.") from None
        claims = {"sub": subject, "role": "authenticated", "aud": "authenticated", "exp": int(time.time()) + _SESSION}
        return JSONResponse(
            {
                # As the daemon knows it: a source with another address is none of its own.
                "url": str(request.base_url).rstrip("/").replace("//localhost", "//127.0.0.1", 1),
                "anonKey": keys.anon_key,
                "accessToken": keys.sign(claims),
                "expiresIn": _SESSION,
                "workflowId": str(WORKFLOW),
            },
            headers={"cache-control": "no-store"},
        )

    async def page(_: Request) -> Response:
        try:
            return Response((directory / "index.html").read_bytes(), media_type="text/html", headers=NO_CACHE)
        except FileNotFoundError:
            return PlainTextResponse(LEFT_OUT, 503)

    files = [Mount("/", BundledFiles(directory=directory))] if directory.is_dir() else []
    return Starlette(
        routes=[Mount(PREFIX, routes=[Route("/session", session, methods=["POST"]), *files]), Route(PREFIX, page)],
        middleware=[Middleware(GZipMiddleware, compresslevel=6)],
        exception_handlers={HTTPException: _error_response},
    )


async def create_first_workflow(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Create the first workflow of a fresh database: a member, a node, and a pending run for it."""
    spec = {"basePrompt": _PROMPT, "seed": 1}
    async with connection.transaction():
        await connection.execute(
            "insert into public.workflow_nodes (id, workflow_id, node_type, node_data, position) "
            "values ('first', $1, 'image', $2, $3)",
            WORKFLOW,
            {"provider": "demo", "model": "painter", "promptSpec": spec},
            {"x": 0, "y": 0},
        )
        await connection.execute(
            "insert into public.workflow_members (workflow_id, user_id) values ($1, $2)", WORKFLOW, VISITOR
        )
        await connection.execute(
            "insert into public.runs (kind, subject_id, status, processor, metadata) "
            "values ('image_gen', $1, 'pending', 'demo:painter', $2)",
            WORKFLOW,
            {"nodeId": "first", "promptSpec": spec},
        )


def _check_origin(request: Request) -> None:
    """Give a session to pages of this machine only: to no other site, also under a name that resolves to it (DNS rebinding)."""
    asked = urlsplit(f"http://{request.headers.get('host', '')}").hostname
    asking = urlsplit(request.headers.get("origin", "")).hostname
    if asked not in _LOOPBACK or asking not in _LOOPBACK:
        raise HTTPException(403, f"Open the canvas as http://127.0.0.1:{request.url.port or 80}{PREFIX}.")


async def _error_response(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"message": error.detail}, error.status_code)
