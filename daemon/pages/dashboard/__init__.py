"""The page for whoever runs image-jobs: figures of `image_jobs.dashboard`, and what the recipes of sql/README.md do.

Beside this file lie the page's sources, which are bundled with the canvas's.
"""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from daemon.database import connected
from daemon.errors import ImageJobsError
from daemon.log import masker
from daemon.pages.dashboard.figures import PERIODS, TIMEOUT, Figures
from daemon.pages.dashboard.guard import Guard
from daemon.pages.dashboard.operations import Bounds, Operation, carry_out, preview
from daemon.pages.files import NO_CACHE, BundledFiles

PREFIX = "/dashboard"
DIST = Path(__file__).with_name("dist")
LEFT_OUT = "The dashboard was left out of this installation. Install again without IMAGE_JOBS_SKIP_CANVAS."
_LONGEST_BODY = 10_000


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    operation: Operation
    bounds: Bounds | None = None


@asynccontextmanager
async def dashboard_app(dsn: str, token: str, directory: Path = DIST) -> AsyncGenerator[Starlette, None]:
    """Serve the page below `/dashboard`, and below `/dashboard/api` what it asks for. Keeps a connection until the context ends.

    Args:
        dsn: Of the database, as an operator.
        token: Without which it says nothing (see `Guard`).
        directory: Of the bundle.
    """
    async with Figures(dsn) as figures:
        yield _application(figures, dsn, token, directory)


def _application(figures: Figures, dsn: str, token: str, directory: Path) -> Starlette:
    async def board(request: Request) -> Response:
        period = request.query_params.get("period", "1h")
        if period not in PERIODS:
            return _refused(f"period is one of {', '.join(PERIODS)}.")
        return Response(await figures.look(period), media_type="application/json")

    async def count(request: Request) -> Response:
        asked = await _read(request)
        async with connected(dsn, timeout=TIMEOUT) as connection:
            return JSONResponse((await preview(connection, asked.operation)).to_json())

    async def act(request: Request) -> Response:
        asked = await _read(request)
        if asked.bounds is None:
            return _refused("bounds is missing: what /api/preview has returned.")
        async with connected(dsn, timeout=TIMEOUT) as connection:
            return JSONResponse((await carry_out(connection, asked.operation, asked.bounds))._asdict())

    async def page(_: Request) -> Response:
        try:
            return Response((directory / "index.html").read_bytes(), media_type="text/html", headers=NO_CACHE)
        except FileNotFoundError:
            return PlainTextResponse(LEFT_OUT, 503)

    api = [
        Route("/board", board, methods=["GET"]),
        Route("/preview", count, methods=["POST"]),
        Route("/act", act, methods=["POST"]),
    ]
    files = [Mount("/", BundledFiles(directory=directory))] if directory.is_dir() else []
    return Starlette(
        routes=[Mount(PREFIX, routes=[Mount("/api", routes=api), *files]), Route(PREFIX, page)],
        middleware=[Middleware(Guard, prefix=PREFIX, token=token)],
        exception_handlers={ImageJobsError: _explain, _Unreadable: _explain_unreadable},
    )


class _Unreadable(Exception):
    """A body that is no operation; the message says what is wrong with it."""


async def _read(request: Request) -> _Asked:
    if request.headers.get("content-type") != "application/json":
        raise _Unreadable("The body is JSON, and its content-type says so.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LONGEST_BODY:
            raise _Unreadable("The body is too long.")
    try:
        return _Asked.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise _Unreadable(f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}.") from None
    except (ValueError, RecursionError):
        raise _Unreadable("The body is no JSON.") from None


def _refused(sentence: str, hint: str = "", status: int = 400) -> Response:
    return JSONResponse({"message": sentence, "hint": hint}, status, headers={"cache-control": "no-store"})


async def _explain(_: Request, error: Exception) -> Response:
    assert isinstance(error, ImageJobsError)
    mask = masker()
    return _refused(mask(error.message), mask(error.hint), 503)


async def _explain_unreadable(_: Request, error: Exception) -> Response:
    return _refused(str(error))
