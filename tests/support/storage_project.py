"""The Storage stand-in with three clients, and helpers for requests."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import httpx
from storage3 import AsyncStorageClient
from supabase import AsyncClientOptions, acreate_client

from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.storage import storage_app
from tests.support.servers import served

YEAR = "31536000"


SECRET = "a secret that only the tests have"


def png(size: int) -> bytes:
    return (b"\x89PNG\r\n\x1a\n" + bytes(size))[:size]


class Replay:
    """The clients, and the last exchange."""

    def __init__(self, url: str, http: httpx.AsyncClient, keys: Keys, **clients: AsyncStorageClient) -> None:
        self.url = url
        self.http = http
        self.keys = keys
        self.exchange: httpx.Response | None = None
        self.service, self.anon, self.user = (clients[name] for name in ("service", "anon", "user"))
        self.outputs = self.service.from_("outputs")
        self.signed = SimpleNamespace(url="", upload="")

    async def seen(self, response: httpx.Response) -> None:
        await response.aread()
        self.exchange = response

    async def put(self, bucket: str, key: str, data: Any, **options: Any) -> Any:
        options = {"content-type": "image/png", "cache-control": YEAR, "upsert": "false"} | options
        return await self.service.from_(bucket).upload(key, data, options)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.http.get(f"{self.url}/storage/v1{path}", headers=headers)

    async def raw(self, method: str, path: str, content: Any = None, **headers: str) -> httpx.Response:
        headers = {"apikey": self.keys.service_role_key} | {k.replace("_", "-"): v for k, v in headers.items()}
        return await self.http.request(method, f"{self.url}/storage/v1{path}", content=content, headers=headers)

    async def with_key(self, key: str) -> AsyncStorageClient:
        return await client(self.url, key, self.http)


async def client(url: str, key: str, http: httpx.AsyncClient, token: str | None = None) -> AsyncStorageClient:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    options = AsyncClientOptions(httpx_client=http, auto_refresh_token=False, persist_session=False, headers=headers)
    made = (await acreate_client(url, key, options)).storage
    if token:
        made._headers["Authorization"] = f"Bearer {token}"
    return made


@asynccontextmanager
async def running(pool: "asyncpg.Pool[asyncpg.Record]", directory: Path, keys: Keys) -> AsyncIterator[Replay]:
    """Serve Storage, with the buckets outputs, limited and private."""
    async with served(storage_app(pool, directory, keys)) as url, httpx.AsyncClient(timeout=20) as http:
        user = keys.sign({"role": "authenticated", "sub": str(uuid4()), "exp": int(time.time()) + 60})
        replay = Replay(
            url,
            http,
            keys,
            service=await client(url, keys.service_role_key, http),
            anon=await client(url, keys.anon_key, http),
            user=await client(url, keys.anon_key, http, user),
        )
        await replay.service.create_bucket("outputs", options={"public": True})
        types = {"public": True, "file_size_limit": 1_000_000, "allowed_mime_types": ["image/png", "image/webp"]}
        await replay.service.create_bucket("limited", options=types)
        await replay.service.create_bucket("private", options={"public": False, "allowed_mime_types": ["image/*"]})
        http.event_hooks = {"response": [replay.seen]}
        yield replay


async def abort(r: Replay) -> None:
    """Abort an upload half-way."""
    address = urlsplit(r.url)
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /storage/v1/object/outputs/abort.png HTTP/1.1\r\nhost: x\r\napikey: {r.keys.service_role_key}\r\n"
    writer.write(head.encode() + b"content-type: image/png\r\ncontent-length: 1000000\r\n\r\n" + png(500_000))
    await writer.drain()
    writer.transport.abort()
