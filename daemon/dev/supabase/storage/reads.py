"""Reads of objects: with a token, in public, by a signed URL; bytes, headers, infos."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from email.utils import format_datetime, formatdate, parsedate_to_datetime
from typing import IO, Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from daemon.dev.supabase.errors import JsonResponse
from daemon.dev.supabase.keys import InvalidToken, Keys
from daemon.dev.supabase.storage.errors import (
    StorageError,
    invalid_range,
    invalid_request,
    invalid_token,
    no_bucket,
    no_object,
)
from daemon.dev.supabase.storage.files import Files
from daemon.dev.supabase.storage.requests import bucket_and_key, caller, json_body, names_in, optional_caller
from daemon.dev.supabase.storage.rows import SERVER, Claims, Row, Rows, format_time, parse_json

_CHUNK = 1 << 18
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_READ = ["GET"]  # starlette adds HEAD


class Reads:
    """Handles requests for `/object` that read, and signs URLs."""

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
            Route("/object/authenticated/{bucket}/{key:path}", self.read_as_caller, methods=_READ),
            Route("/object/{bucket}/{key:path}", self.read, methods=_READ),
        ]

    async def read(self, request: Request) -> Response:
        """Read with or without a valid token. Without one a private bucket is reported as a missing one."""
        bucket, key = bucket_and_key(request)
        claims = optional_caller(request, self._keys)
        public = (await self._rows.bucket(SERVER, bucket))["public"]
        if claims is None and not public:
            raise no_bucket()
        return await self._send(request, await self._rows.object(SERVER if public else claims or SERVER, bucket, key))

    async def read_as_caller(self, request: Request) -> Response:
        caller(request, self._keys)
        return await self.read(request)

    async def info(self, request: Request) -> Response:
        return _info(await self._object(request, caller(request, self._keys)))

    async def public(self, request: Request) -> Response:
        return await self._send(request, await self._public_object(request))

    async def public_info(self, request: Request) -> Response:
        return _info(await self._public_object(request))

    async def signed(self, request: Request) -> Response:
        bucket, key = bucket_and_key(request)
        if "token" not in request.query_params:
            raise invalid_request("querystring must have required property 'token'")
        try:
            token = self._keys.read(request.query_params["token"])
        except InvalidToken as error:
            raise invalid_token(str(error)) from None
        if (token.get("scope"), token.get("url")) != ("download", f"{bucket}/{key}"):
            raise invalid_token("The url does not match the token")
        return await self._send(request, await self._object(request, SERVER), expires=token["exp"])

    async def sign(self, request: Request) -> Response:
        claims, seconds = caller(request, self._keys), _seconds(await json_body(request))
        row = await self._rows.object(claims, *bucket_and_key(request))  # no bucket, no object
        return JsonResponse({"signedURL": self._signed_url(row["bucket_id"], row["name"], seconds)})

    async def sign_all(self, request: Request) -> Response:
        claims, body = caller(request, self._keys), await json_body(request)
        bucket, seconds = request.path_params["bucket"], _seconds(body)
        paths = names_in(body, "paths")
        found = await self._rows.found(claims, bucket, paths)
        error = "Either the object does not exist or you do not have access to it"
        signed = [
            {"error": None, "path": path, "signedURL": self._signed_url(bucket, path, seconds)}
            if path in found
            else {"error": error, "path": path, "signedURL": None}
            for path in paths
        ]
        return JsonResponse(signed)

    def _signed_url(self, bucket: str, key: str, seconds: int) -> str:
        now = int(time.time())
        token = self._keys.sign({"url": f"{bucket}/{key}", "scope": "download", "iat": now, "exp": now + seconds})
        return f"/object/sign/{bucket}/{quote(key)}?token={token}"

    async def _object(self, request: Request, claims: Claims) -> Row:
        bucket, key = bucket_and_key(request)
        await self._rows.bucket(SERVER, bucket)
        return await self._rows.object(claims, bucket, key)

    async def _public_object(self, request: Request) -> Row:
        """Read an object of a public bucket. As on the real server, a missing bucket is reported as a missing object, and a
        private one as a missing bucket."""
        bucket, key = bucket_and_key(request)
        try:
            public = (await self._rows.bucket(SERVER, bucket))["public"]
        except StorageError:
            raise no_object() from None
        if not public:
            raise no_bucket()
        return await self._rows.object(SERVER, bucket, key)

    async def _send(self, request: Request, row: Row, *, expires: int | None = None) -> Response:
        metadata = parse_json(row["metadata"])
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
            headers["content-disposition"] = _attachment(name)
        if _not_modified(request, metadata):
            return Response(status_code=304, headers={**headers, "content-length": "0"})
        start, end, status = 0, size, 200
        if header := request.headers.get("range"):
            start, end = _range(header, size)
            status = 206
            headers |= {"content-length": str(end - start), "content-range": f"bytes {start}-{end - 1}/{size}"}
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        file = await asyncio.to_thread(self._open, row["version"])
        return _FileResponse(file, start, end - start, status, headers)

    def _open(self, version: str) -> IO[bytes]:
        """Open the bytes; they may have been replaced since the row was read."""
        try:
            return self._files.path(version).open("rb")
        except FileNotFoundError:
            raise no_object() from None


class _FileResponse(StreamingResponse):
    """Sends a part of an open file in pieces, and closes it."""

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
    metadata = parse_json(row["metadata"])
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
        "metadata": parse_json(row["user_metadata"]),
        "last_modified": format_time(row["updated_at"]),
        "created_at": format_time(row["created_at"]),
    }
    return JsonResponse(info, headers=headers)


def _attachment(name: str) -> str:
    """Format a file name as RFC 6266 does: once for clients that know `filename*`, once for those that do not."""
    if not name:
        return "attachment;"
    plain = re.sub(r'[^\x20-\x7e]|["\\]', "_", name)
    plain = plain if _TOKEN.fullmatch(plain) else f'"{plain}"'
    return f"attachment; filename={plain}; filename*=UTF-8''{quote(name, safe='!~')}"


def _not_modified(request: Request, metadata: Mapping[str, Any]) -> bool:
    """Whether the client has this version already. If-None-Match alone counts where both are given (RFC 9110, 13.1.3)."""
    if (etag := request.headers.get("if-none-match")) is not None:
        return etag == metadata["eTag"]
    try:
        since = parsedate_to_datetime(request.headers["if-modified-since"])
        return datetime.fromisoformat(metadata["lastModified"]).replace(microsecond=0) <= since
    except (KeyError, ValueError, TypeError):  # there is none, or it is no date
        return False


def _http_date(time: str) -> str:
    return format_datetime(datetime.fromisoformat(time), usegmt=True)


def _seconds(body: dict[str, object]) -> int:
    """Read how many seconds a signed URL is valid."""
    try:
        seconds = int(str(body.get("expiresIn")))
    except ValueError:
        raise invalid_request("body/expiresIn must be integer") from None
    if seconds < 1:
        raise invalid_request("body/expiresIn must be >= 1")
    return seconds


def _range(header: str, size: int) -> tuple[int, int]:
    """Parse start and end of a single range."""
    match = _RANGE.fullmatch(header)
    if match is None or not (match[1] or match[2]):
        raise invalid_range()
    if match[1]:
        start, end = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
    else:
        start, end = max(size - int(match[2]), 0), size
    if start >= end:
        raise invalid_range()
    return start, end
