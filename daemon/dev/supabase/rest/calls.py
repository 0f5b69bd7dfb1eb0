"""Functions: POST with a JSON body, GET with a query string."""

from collections.abc import Sequence

import asyncpg
from starlette.requests import Request
from starlette.responses import Response

from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.rest import bodies, statements
from daemon.dev.supabase.rest.bodies import Body
from daemon.dev.supabase.rest.catalogue import Function, functions
from daemon.dev.supabase.rest.errors import RestError, bad_body, not_implemented
from daemon.dev.supabase.rest.requests import (
    caller,
    check_json,
    check_schema,
    content_type,
    parse_accept,
    parse_prefer,
    parse_query,
)
from daemon.dev.supabase.rest.results import fetch, known_casts, page, respond
from daemon.dev.supabase.rest.statements import CALLED, Statement, counted
from daemon.dev.supabase.rest.transactions import transaction

_UNNAMED = {"application/json": ("json", "jsonb"), "text/plain": ("text",), "application/octet-stream": ("bytea",)}
"""Content type → types of a function's only, unnamed argument that take the whole body."""


class Calls:
    """Handles requests for `/rpc/<function>`.

    Args:
        pool: Connections of a role that may become each of the API roles.
        keys: Of the project.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", keys: Keys) -> None:
        self._pool = pool
        self._keys = keys

    async def call(self, request: Request, name: str) -> Response:
        """POST, GET and HEAD."""
        check_schema(request)
        claims, shape, prefer = caller(request, self._keys), parse_accept(request), parse_prefer(request)
        posted = request.method == "POST"
        query = parse_query(request, call=not posted)
        if query.columns is not None or query.on_conflict is not None:
            raise not_implemented("columns and on_conflict of calls")
        content, media_type = await _content(request) if posted else (b"", "")
        body = _body(content) if media_type == "application/json" else None
        given = (body.keys if body else ()) if posted else tuple(query.arguments)
        async with transaction(self._pool, request, claims) as (connection, overrides):
            function = _choose(name, await functions(connection, name), given, media_type)
            statement = Statement(CALLED, function.columns)
            if function.unnamed and posted and not _fits(function, given):
                text = statements.call_with_body(statement, function, _raw(content, body))
            else:
                arguments = query.arguments if body is None else body.text
                text = statements.call(statement, function, arguments, given)
            columns = statement.columns(await known_casts(connection, query.select))
            filters, ordering = statement.where(query.filters), statement.ordering(query.ordering)
            limit = statement.page(query.offset, query.limit)
            text = counted(
                f"select {columns} from {CALLED}{filters}{ordering}{limit}",  # noqa: S608 - names are quoted, values parameters
                before=f"{CALLED} as ({text}), ",
                total=f"select count(*) from {CALLED}{filters}" if prefer.count else "null",  # noqa: S608 - as there
                single=shape.single or not function.returns_set,
                scalar=not function.returns_row,
                strip_nulls=shape.strip_nulls,
            )
            row = await fetch(connection, text, statement.parameters, shape)
            status, span = page(row, query.offset)
        headers = {"Content-Range": span, "Preference-Applied": prefer.applied}
        if function.returns_nothing:
            return respond(request, shape, overrides, status=204, body=None, headers=headers)
        return respond(request, shape, overrides, status=status, body=row["body"], headers=headers)


async def _content(request: Request) -> tuple[bytes, str]:
    """Read the body. Return it, and its content type without parameters."""
    media_type = content_type(request)
    if media_type not in _UNNAMED:
        check_json(request)
    return await request.body(), media_type


def _body(content: bytes) -> Body:
    """Parse a JSON body; an empty one has no arguments."""
    return bodies.read(content) if content else Body("", (), is_array=False)


def _raw(content: bytes, body: Body | None) -> str:
    if body is not None:
        return body.text
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise bad_body("Empty or invalid json") from None


def _choose(name: str, found: Sequence[Function], given: Sequence[str], media_type: str) -> Function:
    """Choose the function that takes these arguments, or else the one that takes the whole body.

    Raises:
        RestError: If there is none, or more than one.
    """
    fitting = [each for each in found if _fits(each, given)]
    if len(fitting) > 1:
        hint = (
            "Try renaming the parameters or the function itself in the database so function overloading can be resolved"
        )
        choices = ", ".join(
            f"public.{name}({', '.join(f'{k} => {t}' for k, t in f.arguments.items())})" for f in fitting
        )
        message = f"Could not choose the best candidate function between: {choices}"
        raise RestError(300, "PGRST203", message, hint=hint)
    fitting = fitting or [each for each in found if each.unnamed in _UNNAMED.get(media_type, ())]
    if not fitting:
        named = f"({', '.join(given)})" if given else " without parameters"
        plural = "s" if len(given) > 1 else ""
        looked = f"with parameter{plural} {', '.join(given)}" if given else "without parameters"
        also = " or with a single unnamed json/jsonb parameter" if media_type == "application/json" else ""
        raise RestError(
            404,
            "PGRST202",
            f"Could not find the function public.{name}{named} in the schema cache",
            details=f"Searched for the function public.{name} {looked}{also}, but no matches were found in the schema cache.",
        )
    if fitting[0].variadic:
        raise not_implemented("functions with variadic arguments")
    return fitting[0]


def _fits(function: Function, given: Sequence[str]) -> bool:
    required = function.arguments.keys() - function.optional
    return function.unnamed is None and required <= set(given) <= function.arguments.keys()
