"""Broadcasts over HTTP: sending without a WebSocket."""

import json
from collections.abc import Mapping
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daemon.dev.supabase.realtime.access import permissions
from daemon.dev.supabase.realtime.server import Server
from daemon.dev.supabase.realtime.tokens import Claims, TokenRefused, read

MAX_BYTES = 3000 * 1024
"""Of a payload."""

_BLANK = ["can't be blank"]


class Posts:
    """Handles requests for `/api/broadcast`.

    Args:
        server: The parts that connections share.
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    async def batch(self, request: Request) -> Response:
        """Send `{"messages": [{topic, event, payload, private}]}`, without those that the caller may not send."""
        claims = self._caller(request)
        if claims is None:
            return _unauthorized(401)
        body = _parsed(await request.body())
        sent = cast("dict[str, Any]", body).get("messages") if isinstance(body, dict) else None
        if not isinstance(sent, list) or not sent:
            return _invalid({"messages": _BLANK})
        messages = [
            cast("dict[str, Any]", each) if isinstance(each, dict) else {} for each in cast("list[object]", sent)
        ]
        errors = [_errors(each) for each in messages]
        if any(errors):
            return _invalid({"messages": errors})
        for each in messages:
            private = bool(each.get("private"))
            if not private or await self._may_send(claims, str(each["topic"])):
                self._server.messages.publish(str(each["topic"]), str(each["event"]), each["payload"], private=private)
        return Response(status_code=202)

    async def single(self, request: Request) -> Response:
        """Send one message: topic and event are in the path, the body is the payload."""
        claims = self._caller(request)
        if claims is None:
            return _unauthorized(401)
        body = await request.body()
        if len(body) > MAX_BYTES:
            return _invalid({"payload": ["Payload size exceeds tenant limit"]})
        topic, event = request.path_params["topic"], request.path_params["event"]
        private = request.query_params.get("private") == "true"
        if private and not await self._may_send(claims, topic):
            return _unauthorized(403)
        payload = _parsed(body)
        if payload is None:
            return _invalid({"payload": _BLANK})
        self._server.messages.publish(topic, event, payload, private=private)
        return Response(status_code=202)

    async def _may_send(self, claims: Claims, topic: str) -> bool:
        return (await permissions(self._server.pool, claims, topic)).send

    def _caller(self, request: Request) -> Claims | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ") or request.headers.get("apikey")
        try:
            return read(self._server.keys, token) if token else None
        except TokenRefused:
            return None


def _errors(message: Mapping[str, Any]) -> dict[str, list[str]]:
    """Validate a message: return its errors by field."""
    errors = {name: _BLANK for name in ("topic", "event", "payload") if message.get(name) in (None, "")}
    if "payload" not in errors and len(json.dumps(message["payload"])) > MAX_BYTES:
        errors["payload"] = ["Payload size exceeds tenant limit"]
    return errors


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _invalid(errors: Mapping[str, Any]) -> Response:
    return JSONResponse({"errors": errors}, 422)


def _unauthorized(status: int) -> Response:
    return JSONResponse({"message": "Unauthorized"}, status)
