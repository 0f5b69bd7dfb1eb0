"""Writes of objects: uploads, copies, moves, removals; and lists."""

import base64
import time
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from daemon.dev.supabase.errors import JsonResponse
from daemon.dev.supabase.keys import InvalidToken, Keys
from daemon.dev.supabase.storage.buckets import MAX_BYTES
from daemon.dev.supabase.storage.errors import (
    invalid_request,
    invalid_token,
    invalid_type,
    no_object,
    not_implemented,
    too_large,
)
from daemon.dev.supabase.storage.files import Files
from daemon.dev.supabase.storage.requests import bucket_and_key, caller, checked_key, json_body, names_in
from daemon.dev.supabase.storage.rows import (
    SERVER,
    Claims,
    Row,
    Rows,
    format_entry,
    format_object,
    format_time,
    parse_json,
)

SIGNED_UPLOAD_SECONDS = 7200
_FORM_OVERHEAD = 1 << 16


class Objects:
    """Handles requests for `/object` that write or list."""

    def __init__(self, rows: Rows, files: Files, keys: Keys) -> None:
        self._rows = rows
        self._files = files
        self._keys = keys
        self.routes = [
            Route("/object/move", self.move, methods=["POST"]),
            Route("/object/copy", self.copy, methods=["POST"]),
            Route("/object/list/{bucket}", self.list_folder, methods=["POST"]),
            Route("/object/list-v2/{bucket}", self.list_pages, methods=["POST"]),
            Route("/object/{bucket}", self.remove, methods=["DELETE"]),
            Route("/object/upload/sign/{bucket}/{key:path}", self.sign_upload, methods=["POST"]),
            Route("/object/upload/sign/{bucket}/{key:path}", self.upload_signed, methods=["PUT"]),
            Route("/object/{bucket}/{key:path}", self.upload, methods=["POST", "PUT"]),
            Route("/object/{bucket}/{key:path}", self.remove_one, methods=["DELETE"]),
        ]

    async def upload(self, request: Request) -> Response:
        claims = caller(request, self._keys)
        bucket, key = bucket_and_key(request)
        upsert = request.method == "PUT" or request.headers.get("x-upsert") == "true"
        row = await self._write(request, claims, bucket, key, upsert=upsert)
        return JsonResponse({"Key": f"{bucket}/{key}", "Id": str(row["id"])})

    async def sign_upload(self, request: Request) -> Response:
        """Sign a URL for the upload of one object."""
        claims = caller(request, self._keys)
        bucket, key = bucket_and_key(request)
        upsert = request.headers.get("x-upsert") == "true"
        await self._rows.bucket(SERVER, bucket)
        await self._rows.may_write(claims, bucket, key, upsert=upsert)
        now = int(time.time())
        token = self._keys.sign(
            {
                "url": f"{bucket}/{key}",
                "upsert": upsert,
                "scope": "upload",
                "iat": now,
                "exp": now + SIGNED_UPLOAD_SECONDS,
            }
        )
        return JsonResponse({"url": f"/object/upload/sign/{bucket}/{key}?token={token}", "token": token})

    async def upload_signed(self, request: Request) -> Response:
        bucket, key = bucket_and_key(request)
        try:
            token = self._keys.read(request.query_params.get("token", ""))
        except InvalidToken as error:
            raise invalid_token(str(error)) from None
        if (token.get("scope"), token.get("url")) != ("upload", f"{bucket}/{key}"):
            raise invalid_token("The url does not match the token")
        await self._write(request, SERVER, bucket, key, upsert=bool(token.get("upsert")))
        return JsonResponse({"Key": f"{bucket}/{key}"})

    async def copy(self, request: Request) -> Response:
        claims, body = caller(request, self._keys), await json_body(request)
        bucket, source, target = _two_keys(body)
        original = await self._rows.object(claims, bucket, source)
        await self._rows.may_write(claims, bucket, target, upsert=request.headers.get("x-upsert") == "true")
        metadata = {**parse_json(original["metadata"]), "lastModified": format_time(datetime.now(UTC))}
        version = self._files.copy(original["version"])
        row, replaced = await self._rows.put(
            claims,
            bucket,
            target,
            version=version,
            metadata=metadata,
            user_metadata=parse_json(original["user_metadata"]),
        )
        self._files.remove(replaced)
        return JsonResponse({"Key": f"{bucket}/{target}", "Id": str(row["id"]), **format_object(row)})

    async def move(self, request: Request) -> Response:
        claims, body = caller(request, self._keys), await json_body(request)
        await self._rows.move(claims, *_two_keys(body))
        return JsonResponse({"message": "Successfully moved"})

    async def remove(self, request: Request) -> Response:
        """Remove a list of objects. A missing object is no error, nor is a missing bucket."""
        claims, body = caller(request, self._keys), await json_body(request)
        keys = names_in(body, "prefixes")
        return JsonResponse(
            [format_object(row) for row in await self._remove(claims, request.path_params["bucket"], keys)]
        )

    async def remove_one(self, request: Request) -> Response:
        claims = caller(request, self._keys)
        bucket, key = bucket_and_key(request)
        await self._rows.bucket(SERVER, bucket)
        if not await self._remove(claims, bucket, [key]):
            raise no_object()
        return JsonResponse({"message": "Successfully deleted"})

    async def list_folder(self, request: Request) -> Response:
        """List one level of a folder."""
        claims, body = caller(request, self._keys), await json_body(request)
        sort_by: dict[str, Any] = body.get("sortBy") or {}
        column = sort_by.get("column") or "name"
        if column not in ("name", "created_at", "updated_at", "last_accessed_at"):
            raise invalid_request("body/sortBy/column must be equal to one of the allowed values")
        prefix = body.get("prefix") or ""
        entries = await self._rows.folder(
            claims,
            request.path_params["bucket"],
            prefix if not prefix or prefix.endswith("/") else f"{prefix}/",
            limit=int(body.get("limit") or 100),
            offset=int(body.get("offset") or 0),
            search=body.get("search") or "",
            column=column,
            descending=sort_by.get("order") == "desc",
        )
        return JsonResponse([{"name": entry["entry"], **format_entry(entry)} for entry in entries])

    async def list_pages(self, request: Request) -> Response:
        """List one level of a folder, page by page; the cursor is the last key."""
        claims, body = caller(request, self._keys), await json_body(request)
        if not body.get("with_delimiter") or body.get("sortBy"):
            raise not_implemented("list-v2 without with_delimiter, or with sortBy")
        prefix, limit = body.get("prefix") or "", int(body.get("limit") or 1000)
        after = base64.b64decode(body.get("cursor") or "").decode().removeprefix(f"l:{prefix}").rstrip("/")
        found = await self._rows.folder(claims, request.path_params["bucket"], prefix, limit=limit + 1, after=after)
        page: dict[str, Any] = {"hasNext": len(found) > limit}
        if page["hasNext"]:
            last = found[limit - 1]["name"]
            page |= {"nextCursor": base64.b64encode(f"l:{last}".encode()).decode(), "nextCursorKey": last}
        entries = found[:limit]
        page["folders"] = [{"key": each["entry"], "name": each["name"]} for each in entries if each["id"] is None]
        page["objects"] = [
            {"key": each["entry"], "name": each["name"], **format_entry(each)} for each in entries if each["id"]
        ]
        return JsonResponse(page)

    async def _write(self, request: Request, claims: Claims, bucket: str, key: str, *, upsert: bool) -> Row:
        """Check the policies, receive the bytes, then write the row: of concurrent uploads the last one wins.

        As on the real server, it is not checked again whether the key is still free.
        """
        row = await self._rows.bucket(SERVER, bucket)
        await self._rows.may_write(claims, bucket, key, upsert=upsert)
        max_bytes = min(row["file_size_limit"] or MAX_BYTES, MAX_BYTES)
        if int(request.headers.get("content-length", 0)) > max_bytes + _FORM_OVERHEAD:
            raise too_large()
        async with self._files.received(request, max_bytes=max_bytes) as incoming:
            allowed = row["allowed_mime_types"]
            if allowed and not any(_matches(incoming.content_type, pattern) for pattern in allowed):
                raise invalid_type(incoming.content_type)
            metadata = {
                "eTag": incoming.etag,
                "size": incoming.size,
                "mimetype": incoming.content_type,
                "cacheControl": incoming.cache_control,
                "lastModified": format_time(datetime.now(UTC)),
                "contentLength": incoming.size,
                "httpStatusCode": 200,
            }
            version = self._files.keep(incoming)
            row, replaced = await self._rows.put(
                claims, bucket, key, version=version, metadata=metadata, user_metadata=incoming.metadata
            )
        self._files.remove(replaced)
        return row

    async def _remove(self, claims: Claims, bucket: str, keys: list[str]) -> list[Row]:
        removed = await self._rows.remove(claims, bucket, keys)
        for row in removed:
            self._files.remove(row["version"])
        return removed


def _matches(content_type: str, pattern: str) -> bool:
    """Whether a type matches a pattern like `image/*`; parameters after a semicolon do not count."""
    plain = content_type.partition(";")[0].strip().lower()
    return plain.startswith(pattern[:-1]) if pattern.endswith("/*") else plain == pattern.lower()


def _two_keys(body: dict[str, Any]) -> tuple[str, str, str]:
    """Read bucket, source and target of a copy or a move."""
    names = ("bucketId", "sourceKey", "destinationKey")
    if missing := [name for name in names if not isinstance(body.get(name), str)]:
        raise invalid_request(f"body must have required property '{missing[0]}'")
    if body.get("destinationBucket") not in (None, body["bucketId"]):
        raise not_implemented("copies and moves between buckets")
    bucket, source, target = (body[name] for name in names)
    return bucket, source, checked_key(target)
