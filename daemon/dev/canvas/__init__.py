"""The page at `/canvas`, and who its visitor is: `image-jobs dev` has no sign-in, so it hands a session to its own page.

Beside this file lie the page's sources; `build.py` bundles them into `dist/` while the package is built.
"""

import time
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from daemon.dev.keys import Keys

PREFIX = "/canvas"
WORKFLOW = UUID("00000000-0000-4000-8000-000000000001")
"""The workflow that a data directory begins with."""
VISITOR = UUID("00000000-0000-4000-8000-000000000002")
"""Who sits in front of this machine; the founder of `WORKFLOW`."""

DIST = Path(__file__).with_name("dist")
LEFT_OUT = "The canvas was left out of this installation. Install again without IMAGE_JOBS_SKIP_CANVAS."

_PROMPT = "A red fox in a birch wood, first snow, morning light"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SESSION = 3600
"""Seconds, as a session of Supabase lasts; the page asks for the next one by itself."""


def canvas_app(keys: Keys, directory: Path = DIST) -> Starlette:
    """The page below `/canvas`, and its session.

    Args:
        keys: Sign the session.
        directory: The bundle.
    """

    async def session(request: Request) -> Response:
        _refuse_strangers(request)
        user = request.query_params.get("as", str(VISITOR))
        try:
            subject = str(UUID(user))
        except ValueError:
            raise HTTPException(400, "as must be a uuid.") from None
        claims = {"sub": subject, "role": "authenticated", "aud": "authenticated", "exp": int(time.time()) + _SESSION}
        return JSONResponse(
            {
                "url": str(request.base_url).rstrip("/"),
                "anonKey": keys.anon_key,
                "accessToken": keys.sign(claims),
                "expiresIn": _SESSION,
                "workflowId": str(WORKFLOW),
            },
            headers={"cache-control": "no-store"},
        )

    async def page(_: Request) -> Response:
        try:
            return Response((directory / "index.html").read_bytes(), media_type="text/html", headers=_ASK_AGAIN)
        except FileNotFoundError:
            return PlainTextResponse(LEFT_OUT, 503)

    files = [Mount("/", _Files(directory=directory))] if directory.is_dir() else []
    return Starlette(
        routes=[Mount(PREFIX, routes=[Route("/session", session, methods=["POST"]), *files]), Route(PREFIX, page)],
        exception_handlers={HTTPException: _say},
    )


async def found_first_workflow(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Makes the workflow that a fresh database begins with: one node, and its image under way."""
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


_ASK_AGAIN = {"cache-control": "no-cache"}
"""The next version of the page has the same addresses."""


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_ASK_AGAIN)
        return response


def _refuse_strangers(request: Request) -> None:
    """A session is for our own page on this machine: not for other sites, also not under a name that points here."""
    origin = request.headers.get("origin", "")
    own = f"http://{request.headers.get('host', '')}"
    if origin != own or urlsplit(own).hostname not in _LOOPBACK:
        raise HTTPException(403, f"Open the canvas as http://127.0.0.1:{request.url.port or 80}{PREFIX}.")


async def _say(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"message": error.detail}, error.status_code)
