"""Errors of the stand-in's HTTP endpoints, and how Starlette renders them."""

from collections.abc import Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

JSON = "application/json; charset=utf-8"


class JsonResponse(JSONResponse):
    """JSON with the charset that Supabase's servers name."""

    media_type = JSON


class ApiError(Exception):
    """An error as the client receives it.

    Args:
        status: Of the response.
        message: For people; part of the body.
        body: Of the response.
        headers: Further headers of the response.
    """

    def __init__(
        self, status: int, message: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body
        self.headers = headers

    def response(self, request: Request | None = None) -> Response:  # noqa: ARG002 - the form of some depends on it
        return JsonResponse(self.body, self.status, self.headers)


def error_handlers(not_implemented: Callable[[str], ApiError]) -> Mapping[Any, Any]:
    """Return the exception handlers of an endpoint.

    Args:
        not_implemented: Makes the error for a route or method that the stand-in does not have.
    """

    async def respond(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response(request)

    async def no_route(request: Request, _: Exception) -> Response:
        return not_implemented(f"{request.method} {request.url.path}").response(request)

    async def disconnected(_: Request, __: Exception) -> Response:
        """The client went away in the middle of a request."""
        return Response(status_code=499)

    return {ApiError: respond, HTTPException: no_route, ClientDisconnect: disconnected}
