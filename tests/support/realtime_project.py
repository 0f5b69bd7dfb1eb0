"""A project with Auth, REST and Realtime, and a client that works on frames."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import asyncpg
import websockets
from websockets.asyncio.client import ClientConnection

from daemon.dev.supabase.auth import TOKEN_LIFETIME, auth_app
from daemon.dev.supabase.gateway import listen, one_port, serving
from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.realtime import realtime_app
from daemon.dev.supabase.rest import rest_app
from tests.support.postgres import Cluster, connect

SECRET = "a secret that only the tests have"
USER = "11111111-1111-1111-1111-111111111111"
QUICK = 0.05
"""Seconds until a join is denied."""


@dataclass(frozen=True)
class Project:
    """A running stand-in: its address, its keys, and a connection as `postgres`."""

    url: str
    keys: Keys
    db: "asyncpg.Connection[asyncpg.Record]"

    def token(self, user: str = USER, **claims: Any) -> str:
        return self.keys.sign({"role": "authenticated", "sub": user, "exp": int(time.time()) + 60, **claims})

    def websocket(self, **query: str) -> str:
        return f"{self.url.replace('http', 'ws')}/realtime/v1/websocket?{urlencode(query)}"

    @asynccontextmanager
    async def wire(self, version: str) -> AsyncIterator["Wire"]:
        url = self.websocket(apikey=self.keys.anon_key, vsn=version)
        async with websockets.connect(url, max_size=None) as socket:
            yield Wire(socket, version)


@asynccontextmanager
async def running(
    postgres: Cluster,
    *,
    migrated: bool = True,
    lifetime: timedelta = TOKEN_LIFETIME,
    messages_per_second: int | None = None,
) -> AsyncIterator[Project]:
    """Serve Auth, REST and Realtime on one port, with a new database; access tokens live as long as `lifetime`, and Realtime
    drops what goes beyond `messages_per_second`."""
    keys = Keys(SECRET, anon_key="sb_publishable_test", service_role_key="sb_secret_test")
    async with postgres.database() if migrated else postgres.database(template=None) as dsn:
        database = dsn.rpartition("/")[2]
        as_gateway = postgres.server.dsn(database, user="authenticator")
        as_auth = postgres.server.dsn(database, user="supabase_auth_admin")
        async with (
            asyncpg.create_pool(dsn, min_size=0) as pool,
            asyncpg.create_pool(as_gateway, min_size=0) as rest,
            asyncpg.create_pool(as_auth, min_size=0) as auth,
            realtime_app(dsn, pool, keys, denial_delay=QUICK, messages_per_second=messages_per_second) as realtime,
        ):
            listening = listen(0)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            apps = {
                "/auth/v1": auth_app(auth, keys, url, lifetime=lifetime),
                "/rest/v1": rest_app(rest, keys),
                "/realtime/v1": realtime,
            }
            async with serving(one_port(apps), listening):
                db = await connect(dsn)
                try:
                    yield Project(url, keys, db)
                finally:
                    await db.close()


@dataclass(frozen=True)
class Wire:
    """A WebSocket that sends and receives frames, in the form in which they were recorded."""

    socket: ClientConnection
    version: str

    async def send(
        self, topic: str, event: str, payload: Any, *, ref: str | None = None, join_ref: str | None = None
    ) -> None:
        frame: Any = [join_ref, ref, topic, event, payload]
        if self.version == "1.0.0":
            frame = {"topic": topic, "event": event, "payload": payload, "ref": ref, "join_ref": join_ref}
        await self.socket.send(json.dumps(frame))

    async def next(self, count: int = 1) -> list[Any]:
        """Receive the next frames."""
        async with asyncio.timeout(40):
            return [_recorded(await self.socket.recv()) for _ in range(count)]

    async def join(
        self, topic: str, ref: str, *, token: str | None = None, replies: int = 1, **config: Any
    ) -> list[Any]:
        """Join a topic, and receive a number of frames."""
        config = {"broadcast": {"ack": False, "self": False}, "presence": {"key": "", "enabled": False}} | config
        payload: dict[str, Any] = {"config": {"private": False, "postgres_changes": []} | config}
        if token is not None:
            payload["access_token"] = token
        await self.send(topic, "phx_join", payload, ref=ref, join_ref=ref)
        return await self.next(replies)

    async def silence(self) -> list[Any]:
        """Receive the frames until the reply to a heartbeat: replies come in order."""
        ref = uuid4().hex
        await self.send("phoenix", "heartbeat", {}, ref=ref)
        came: list[Any] = []
        while ref not in json.dumps(frame := (await self.next())[0]):
            came.append(frame)
        return came


def _recorded(frame: str | bytes) -> Any:
    if isinstance(frame, str):
        return json.loads(frame)
    kind, topic, event, meta, encoding = frame[:5]
    texts = [
        frame[sum((topic, event, meta)[:n]) + 5 : sum((topic, event, meta)[: n + 1]) + 5].decode() for n in range(3)
    ]
    payload: Any = frame[5 + topic + event + meta :]
    return {
        "binary": {
            "kind": kind,
            "topic": texts[0],
            "event": texts[1],
            "metadata": texts[2],
            "encoding": encoding,
            "payload": json.loads(payload) if encoding == 1 else payload,
        }
    }
