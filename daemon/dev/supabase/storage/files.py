"""The bytes of objects: files named by version, so that no key becomes a path."""

import base64
import binascii
import hashlib
import json
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from daemon.dev.supabase.storage.errors import invalid_request, too_large


@dataclass
class Incoming:
    """An upload: its bytes in a file, its headers and metadata."""

    path: Path
    content_type: str = "application/octet-stream"
    cache_control: str = "no-cache"
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    size: int = 0
    etag: str = ""


class Files:
    """A directory of files, one for each version of each object.

    Args:
        directory: Created if it does not exist. Files of interrupted uploads are removed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._incoming = directory / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        for left_over in self._incoming.iterdir():
            left_over.unlink()

    def path(self, version: str) -> Path:
        return self._directory / version[:2] / version

    def keep(self, incoming: Incoming) -> str:
        """Move an upload to its place, atomically. Return its version."""
        version = str(uuid4())
        path = self.path(version)
        path.parent.mkdir(exist_ok=True)
        incoming.path.rename(path)
        return version

    def copy(self, version: str) -> str:
        """Make a second version with the same bytes, as a hard link: versions never change."""
        copy = str(uuid4())
        path = self.path(copy)
        path.parent.mkdir(exist_ok=True)
        os.link(self.path(version), path)
        return copy

    def remove(self, version: str | None) -> None:
        if version is not None:
            self.path(version).unlink(missing_ok=True)

    @asynccontextmanager
    async def received(self, request: Request, *, max_bytes: int) -> AsyncGenerator[Incoming]:
        """Receive the request's body. At the end its file is deleted, unless it was kept: an aborted upload leaves none.

        Raises:
            StorageError: If it is larger than `max_bytes`, or has no file.
        """
        incoming = Incoming(self._incoming / str(uuid4()))
        try:
            with incoming.path.open("xb") as file:
                sink = _Sink(file.write, max_bytes)
                content_type, options = parse_options_header(request.headers.get("content-type"))
                if content_type == b"multipart/form-data":
                    await _receive_form(request, options.get(b"boundary", b""), sink, incoming)
                else:
                    await _receive_raw(request, sink, incoming)
            incoming.size, incoming.etag = sink.size, f'"{sink.md5.hexdigest()}"'
            yield incoming
        finally:
            incoming.path.unlink(missing_ok=True)


class _Sink:
    """Counts, hashes and writes bytes."""

    def __init__(self, write: Any, max_bytes: int) -> None:
        self.size = 0
        self.md5 = hashlib.md5(usedforsecurity=False)
        self._write = write
        self._max_bytes = max_bytes

    def add(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self._max_bytes:
            raise too_large()
        self.md5.update(data)
        self._write(data)


async def _receive_raw(request: Request, sink: _Sink, incoming: Incoming) -> None:
    """Receive a body that is the object; type, cache control and metadata are headers."""
    incoming.content_type = request.headers.get("content-type", incoming.content_type)
    incoming.cache_control = request.headers.get("cache-control", incoming.cache_control)
    if text := request.headers.get("x-metadata"):
        incoming.metadata = _metadata(text, encoded=True)
    async for data in request.stream():
        sink.add(data)


async def _receive_form(request: Request, boundary: bytes, sink: _Sink, incoming: Incoming) -> None:
    """Receive a form as storage3 and storage-js send it: fields `cacheControl` and `metadata`, and one file."""
    form = _Form(sink)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": form.on_part_begin,
                "on_header_field": form.on_header_field,
                "on_header_value": form.on_header_value,
                "on_header_end": form.on_header_end,
                "on_headers_finished": form.on_headers_finished,
                "on_part_data": form.on_part_data,
            },
        )
        async for data in request.stream():
            parser.write(data)
    except MultipartParseError as error:
        raise invalid_request(str(error)) from None
    if form.file_type is None:
        raise invalid_request("No content provided", "InvalidRequest")
    incoming.content_type = form.file_type
    if "cacheControl" in form.fields:
        incoming.cache_control = f"max-age={form.fields['cacheControl'].decode()}"
    if "metadata" in form.fields:
        incoming.metadata = _metadata(form.fields["metadata"].decode(), encoded=False)


class _Form:
    """The parser's callbacks: fields are kept in memory, the file goes to the sink."""

    def __init__(self, sink: _Sink) -> None:
        self.fields: dict[str, bytearray] = {}
        self.file_type: str | None = None
        self._sink = sink
        self._name = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._field: bytearray | None = None

    def on_part_begin(self) -> None:
        self._headers = {}

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"filename" in options:
            self._field = None
            # The real server's parser drops the parameters; those of a raw body's type it keeps.
            content_type, _ = parse_options_header(self._headers.get(b"content-type", b"application/octet-stream"))
            self.file_type = content_type.decode("latin-1")
        else:
            self._field = self.fields[options.get(b"name", b"").decode("latin-1")] = bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._sink.add(data[start:end])
        elif len(self._field) + end - start > 1 << 20:
            raise too_large()
        else:
            self._field += data[start:end]


def _metadata(text: str, *, encoded: bool) -> Mapping[str, Any]:
    try:
        found = json.loads(base64.b64decode(text, validate=True) if encoded else text)
    except (ValueError, binascii.Error):
        found = None
    if not isinstance(found, dict):
        raise invalid_request("metadata must be a JSON object")
    return cast("dict[str, Any]", found)
