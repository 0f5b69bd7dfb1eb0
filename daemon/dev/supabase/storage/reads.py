"""Objects that are read: with a key, in public, by a signed URL; their bytes, their head, their row."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from datetime import datetime
from email.utils import format_datetime, formatdate
from typing import IO
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from daemon.dev.keys import InvalidToken, Keys
from daemon.dev.storage.answers import (
    Answer,
    StorageError,
    invalid_range,
    invalid_request,
    invalid_token,
    no_bucket,
    no_object,
)
from daemon.dev.storage.files import Files
from daemon.dev.storage.requests import bucket_and_key, caller, json_body, names_in
from daemon.dev.storage.rows import SERVER, Claims, Row, Rows, seen_json, seen_time

_CHUNK = 1 << 18
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_READ = ["GET"]  # starlette adds HEAD


class Reads:
    """Shows objects, and signs URLs that show them."""

    def __init__(self, rows: Rows, files: Files, keys: Keys) -> None:
        self._rows = rows
        self._files = files
        self._keys = keys
        self.routes = [
            Route("/object/sign/{bucket}", self.sign_all, methods=["POST"]),
            Route("/object/sign/{bucket}/{key:path}", self.sign, methods=["POST"]),
            Route("/object/sign/{bucket}/{key:path}", self.signed, methods=_READ),
            Route("/object/public/{bucket}/{key:path}", self.public, methods=_READ),
            Route("/object/info/public/{bucket}/{key:path}", self.public_info, methods=_READ),
            Route("/object/info/authenticated/{bucket}/{key:path}", self.info, methods=_READ),
            Route("/object/info/{bucket}/{key:path}", self.info, methods=_READ),
            Route("/object/authenticated/{bucket}/{key:path}", self.read, methods=_READ),
            Route("/object/{bucket}/{key:path}", self.read, methods=_READ),
        ]

    async def read(self, request: Request) -> Response:
        return await self._send(request, await self._object(request, caller(request, self._keys)))

    async def info(self, request: Request) -> Response:
        return _info(await self._object(request, caller(request, self._keys)))

    async def public(self, request: Request) -> Response:
        return await self._send(request, await self._public_object(request))

    async def public_info(self, request: Request) -> Response:
        return _info(await self._public_object(request))

    async def signed(self, request: Request) -> Response:
        bucket, key = bucket_and_key(request)
        try:
            token = self._keys.read(request.query_params.get("token", ""))
        except InvalidToken as error:
            raise invalid_token(str(error)) from None
        if (token.get("scope"), token.get("url")) != ("download", f"{bucket}/{key}"):
            raise invalid_token("The url does not match the token")
        return await self._send(request, await self._object(request, SERVER), expires=token["exp"])

    async def sign(self, request: Request) -> Response:
        claims, seconds = caller(request, self._keys), _seconds(await json_body(request))
        row = await self._object(request, claims)
        return Answer({"signedURL": self._signed_url(row["bucket_id"], row["name"], seconds)})

    async def sign_all(self, request: Request) -> Response:
        claims, body = caller(request, self._keys), await json_body(request)
        bucket, seconds = request.path_params["bucket"], _seconds(body)
        signed: list[dict[str, str | None]] = []
        for path in names_in(body, "paths"):
            try:
                await self._rows.object(claims, bucket, path)
                signed.append({"error": None, "path": path, "signedURL": self._signed_url(bucket, path, seconds)})
            except StorageError:
                error = "Either the object does not exist or you do not have access to it"
                signed.append({"error": error, "path": path, "signedURL": None})
        return Answer(signed)

    def _signed_url(self, bucket: str, key: str, seconds: int) -> str:
        now = int(time.time())
        token = self._keys.sign({"url": f"{bucket}/{key}", "scope": "download", "iat": now, "exp": now + seconds})
        return f"/object/sign/{bucket}/{quote(key)}?token={token}"

    async def _object(self, request: Request, claims: Claims) -> Row:
        bucket, key = bucket_and_key(request)
        await self._rows.bucket(SERVER, bucket)
        return await self._rows.object(claims, bucket, key)

    async def _public_object(self, request: Request) -> Row:
        """A missing bucket looks like a missing object here, and a private one like a missing bucket."""
        bucket, key = bucket_and_key(request)
        try:
            public = (await self._rows.bucket(SERVER, bucket))["public"]
        except StorageError:
            raise no_object() from None
        if not public:
            raise no_bucket()
        return await self._rows.object(SERVER, bucket, key)

    async def _send(self, request: Request, row: Row, *, expires: int | None = None) -> Response:
        metadata = seen_json(row["metadata"])
        size = metadata["size"]
        headers = {
            "accept-ranges": "bytes",
            "content-type": metadata["mimetype"],
            "etag": metadata["eTag"],
            "x-robots-tag": "none",
            "last-modified": _http_date(metadata["lastModified"]),
            "content-length": str(size),
        }
        headers |= (
            {"cache-control": metadata["cacheControl"]}
            if expires is None
            else {"expires": formatdate(expires, usegmt=True)}
        )
        if (name := request.query_params.get("download")) is not None:
            name = quote(name, safe="")
            headers["content-disposition"] = (
                f"attachment; filename={name}; filename*=UTF-8''{name};" if name else "attachment;"
            )
        if request.headers.get("if-none-match") == metadata["eTag"]:
            return Response(status_code=304, headers={**headers, "content-length": "0"})
        start, end, status = 0, size, 200
        if asked := request.headers.get("range"):
            start, end = _range(asked, size)
            status = 206
            headers |= {"content-length": str(end - start), "content-range": f"bytes {start}-{end - 1}/{size}"}
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        file = await asyncio.to_thread(self._open, row["version"])
        return _FileResponse(file, start, end - start, status, headers)

    def _open(self, version: str) -> IO[bytes]:
        """The bytes; somebody may have replaced them since the row was read."""
        try:
            return self._files.path(version).open("rb")
        except FileNotFoundError:
            raise no_object() from None


class _FileResponse(StreamingResponse):
    """Sends a part of an open file in pieces, and closes it whatever happens."""

    def __init__(self, file: IO[bytes], start: int, length: int, status: int, headers: dict[str, str]) -> None:
        super().__init__(self._pieces(start, length), status, headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)

    async def _pieces(self, start: int, length: int) -> AsyncIterator[bytes]:
        self._file.seek(start)
        while length > 0 and (piece := await asyncio.to_thread(self._file.read, min(length, _CHUNK))):
            length -= len(piece)
            yield piece


def _info(row: Row) -> Response:
    metadata = seen_json(row["metadata"])
    headers = {
        "etag": metadata["eTag"],
        "last-modified": _http_date(metadata["lastModified"]),
        "cache-control": metadata["cacheControl"],
    }
    info = {
        "id": str(row["id"]),
        "name": row["name"],
        "version": row["version"],
        "bucket_id": row["bucket_id"],
        "size": metadata["size"],
        "content_type": metadata["mimetype"],
        "cache_control": metadata["cacheControl"],
        "etag": metadata["eTag"],
        "metadata": seen_json(row["user_metadata"]),
        "last_modified": seen_time(row["updated_at"]),
        "created_at": seen_time(row["created_at"]),
    }
    return Answer(info, headers=headers)


def _http_date(time: str) -> str:
    return format_datetime(datetime.fromisoformat(time), usegmt=True)


def _seconds(body: dict[str, object]) -> int:
    """How long a signed URL shall work."""
    try:
        seconds = int(str(body.get("expiresIn")))
    except ValueError:
        raise invalid_request("body/expiresIn must be integer") from None
    if seconds < 1:
        raise invalid_request("body/expiresIn must be >= 1")
    return seconds


def _range(asked: str, size: int) -> tuple[int, int]:
    """Start and end of the one range that is asked for."""
    match = _RANGE.fullmatch(asked)
    if match is None or not (match[1] or match[2]):
        raise invalid_range()
    if match[1]:
        start, end = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
    else:
        start, end = max(size - int(match[2]), 0), size
    if start >= end:
        raise invalid_range()
    return start, end
