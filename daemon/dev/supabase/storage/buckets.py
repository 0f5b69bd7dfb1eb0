"""Buckets: /bucket."""

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from daemon.dev.supabase.errors import JsonResponse
from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.storage.errors import invalid_bucket, invalid_request, not_empty, too_large
from daemon.dev.supabase.storage.files import Files
from daemon.dev.supabase.storage.requests import caller, json_body
from daemon.dev.supabase.storage.rows import Rows, format_bucket

MAX_BYTES = 52_428_800
"""The limit of the whole server, as in a free project."""

_NAME = re.compile(r"[\w!\-.*'()&$@=;:+,?](?:[\w!\-.*'() &$@=;:+,?]{0,98}[\w!\-.*'()&$@=;:+,?])?", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(b|kb|mb|gb)?", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3}


class Buckets:
    """Handles requests for `/bucket`."""

    def __init__(self, rows: Rows, files: Files, keys: Keys) -> None:
        self._rows = rows
        self._files = files
        self._keys = keys
        self.routes = [
            Route("/bucket", self.all, methods=["GET"]),
            Route("/bucket", self.create, methods=["POST"]),
            Route("/bucket/{bucket}", self.one, methods=["GET"]),
            Route("/bucket/{bucket}", self.update, methods=["PUT"]),
            Route("/bucket/{bucket}", self.delete, methods=["DELETE"]),
            Route("/bucket/{bucket}/empty", self.empty, methods=["POST"]),
        ]

    async def all(self, request: Request) -> Response:
        found = await self._rows.buckets(caller(request, self._keys))
        return JsonResponse([format_bucket(row, with_type=True) for row in found])

    async def one(self, request: Request) -> Response:
        return JsonResponse(
            format_bucket(await self._rows.bucket(caller(request, self._keys), request.path_params["bucket"]))
        )

    async def create(self, request: Request) -> Response:
        claims, body = caller(request, self._keys), await json_body(request)
        name = body.get("id") or body.get("name") or ""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise invalid_bucket()
        await self._rows.create_bucket(
            claims,
            name,
            public=bool(body.get("public")),
            limit=_size(body.get("file_size_limit")),
            types=body.get("allowed_mime_types"),
        )
        return JsonResponse({"name": name})

    async def update(self, request: Request) -> Response:
        claims, body = caller(request, self._keys), await json_body(request)
        changes: dict[str, Any] = {
            name: body[name] for name in ("public", "file_size_limit", "allowed_mime_types") if name in body
        }
        if "file_size_limit" in changes:
            changes["file_size_limit"] = _size(changes["file_size_limit"])
        await self._rows.update_bucket(claims, request.path_params["bucket"], changes)
        return JsonResponse({"message": "Successfully updated"})

    async def delete(self, request: Request) -> Response:
        claims, bucket = caller(request, self._keys), request.path_params["bucket"]
        await self._rows.bucket(claims, bucket)
        if await self._rows.has_objects(bucket):
            raise not_empty()
        await self._rows.delete_bucket(claims, bucket)
        return JsonResponse({"message": "Successfully deleted"})

    async def empty(self, request: Request) -> Response:
        """Delete all objects. The real server queues this; here it is done before the response."""
        claims, bucket = caller(request, self._keys), request.path_params["bucket"]
        await self._rows.bucket(claims, bucket)
        for row in await self._rows.remove(claims, bucket, None):
            self._files.remove(row["version"])
        return JsonResponse({"message": "Empty bucket has been queued. Completion may take up to an hour."})


def _size(value: object) -> int | None:
    """Parse a number of bytes, or a text like `20mb`."""
    if value is None:
        return None
    match = _SIZE.fullmatch(str(value))
    if match is None:
        raise invalid_request("body/file_size_limit must be a number of bytes or a size like 20MB")
    size = int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    if size > MAX_BYTES:
        raise too_large()
    return size
