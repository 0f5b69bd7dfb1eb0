"""Broadcast from the database: a row of `realtime.messages` goes out to those who listen to its topic.

The real server reads the log through a replication slot. Here a trigger notifies: a commit is heard as soon, in the order
of commits, and a message that nobody is there to hear is gone, too.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from daemon.dev.realtime.frames import Broadcast, Message
from daemon.dev.realtime.rooms import PREFIX, Rooms

MOST_REPLAYED = 25
_HEARD = "realtime_messages"
_TRIGGER = """
create or replace function realtime.tell_stand_in() returns trigger
language plpgsql security definer set search_path = ''
as $$
begin
  perform pg_notify('realtime_messages', new.id::text);
  return null;
end
$$;
create or replace trigger tell_stand_in after insert on realtime.messages
for each row execute function realtime.tell_stand_in();
-- The real server keeps them as long.
delete from realtime.messages where inserted_at < (now() at time zone 'utc') - interval '72 hours';
"""


class Messages:
    """The table of messages.

    Args:
        dsn: Where to listen.
        pool: Connections to the same database, of a role that sees every message.
        rooms: Who is told.
    """

    def __init__(self, dsn: str, pool: "asyncpg.Pool[asyncpg.Record]", rooms: Rooms) -> None:
        self._dsn = dsn
        self._pool = pool
        self._rooms = rooms
        self._heard: asyncio.Queue[str] = asyncio.Queue()

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[None]:
        """Hears from the moment that the block begins; `run` then tells."""
        connection = await asyncpg.connect(self._dsn)
        try:
            await connection.execute(_TRIGGER)
            await connection.add_listener(_HEARD, self._hear)
            yield
        finally:
            await connection.close()

    def _hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self._heard.put_nowait(str(payload))

    async def run(self) -> None:
        """Tells what is heard, for ever."""
        while True:
            ids = [await self._heard.get()]
            while not self._heard.empty():
                ids.append(self._heard.get_nowait())
            rows = await self._pool.fetch(
                """select m.id::text, m.topic, m.event, m.private, m.payload::text
                from unnest($1::text[]) with ordinality as heard (id, place)
                join realtime.messages m on m.id = heard.id::uuid where m.extension = 'broadcast' order by heard.place""",
                ids,
            )
            for row in rows:
                broadcast = Broadcast(
                    PREFIX + row["topic"], row["event"] or "", (row["payload"] or "null").encode(), {"id": row["id"]}
                )
                self._rooms.tell(row["topic"], broadcast, private=bool(row["private"]))

    async def past(self, topic: str, name: str, replay: Mapping[str, Any], join_ref: str | None) -> list[Message]:
        """The newest private messages of a topic, oldest first, as `replay` of a join asks for them."""
        rows = await self._pool.fetch(
            """select m.id::text, m.event, m.payload::text from realtime.messages m
            where m.topic = $1 and m.private and m.extension = 'broadcast'
              and m.inserted_at >= to_timestamp($2::bigint / 1000.0) at time zone 'utc'
            order by m.inserted_at desc limit $3""",
            name,
            int(replay.get("since") or 0),
            max(1, min(int(replay.get("limit") or MOST_REPLAYED), MOST_REPLAYED)),
        )
        return [
            Broadcast(topic, row["event"], row["payload"].encode(), {"id": row["id"], "replayed": True}).message(
                join_ref
            )
            for row in reversed(rows)
        ]

    async def said(self, name: str, event: str, payload: Any, *, private: bool) -> None:
        """Tells what came over HTTP."""
        content = json.dumps(payload).encode()
        self._rooms.tell(name, Broadcast(PREFIX + name, event, content, text=True), private=private)
