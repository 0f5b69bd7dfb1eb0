"""Broadcasts from the database: rows of `realtime.messages` are sent to the channels of their topic.

The real server reads the log through a replication slot. Here a trigger notifies: as soon after the commit, in the order
of commits; and a message without a listening server is lost, too.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from daemon.dev.supabase.realtime.frames import Broadcast, Message
from daemon.dev.supabase.realtime.rooms import PREFIX, Rooms

MOST_REPLAYED = 25
_CHANNEL = "realtime_messages"
_TRIGGER = """
create or replace function realtime.notify_stand_in() returns trigger
language plpgsql security definer set search_path = ''
as $$
begin
  perform pg_notify('realtime_messages', new.id::text);
  return null;
end
$$;
create or replace trigger notify_stand_in after insert on realtime.messages
for each row execute function realtime.notify_stand_in();
-- The retention of the real server.
delete from realtime.messages where inserted_at < (now() at time zone 'utc') - interval '72 hours';
"""


class Messages:
    """Sends the rows of `realtime.messages`.

    Args:
        dsn: Of the database.
        pool: Connections to the same database, of a role that sees every message.
        rooms: The channels.
    """

    def __init__(self, dsn: str, pool: "asyncpg.Pool[asyncpg.Record]", rooms: Rooms) -> None:
        self._dsn = dsn
        self._pool = pool
        self._rooms = rooms
        self._ids: asyncio.Queue[str] = asyncio.Queue()

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[None]:
        """Listen for notifications for as long as the context lasts; `run` sends the messages."""
        connection = await asyncpg.connect(self._dsn)
        try:
            await connection.execute(_TRIGGER)
            await connection.add_listener(_CHANNEL, self._on_notification)
            yield
        finally:
            await connection.close()

    def _on_notification(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self._ids.put_nowait(str(payload))

    async def run(self) -> None:
        """Send messages until cancelled."""
        while True:
            ids = [await self._ids.get()]
            while not self._ids.empty():
                ids.append(self._ids.get_nowait())
            rows = await self._pool.fetch(
                """select m.id::text, m.topic, m.event, m.private, m.payload::text
                from unnest($1::text[]) with ordinality as notified (id, place)
                join realtime.messages m on m.id = notified.id::uuid where m.extension = 'broadcast' order by notified.place""",
                ids,
            )
            for row in rows:
                broadcast = Broadcast(
                    PREFIX + row["topic"], row["event"] or "", (row["payload"] or "null").encode(), {"id": row["id"]}
                )
                self._rooms.broadcast(row["topic"], broadcast, private=bool(row["private"]))

    async def replay(self, topic: str, name: str, options: Mapping[str, Any], join_ref: str | None) -> list[Message]:
        """Fetch the newest private messages of a topic, oldest first; `options` are those of the join."""
        rows = await self._pool.fetch(
            """select m.id::text, m.event, m.payload::text from realtime.messages m
            where m.topic = $1 and m.private and m.extension = 'broadcast'
              and m.inserted_at >= to_timestamp($2::bigint / 1000.0) at time zone 'utc'
            order by m.inserted_at desc limit $3""",
            name,
            int(options.get("since") or 0),
            max(1, min(int(options.get("limit") or MOST_REPLAYED), MOST_REPLAYED)),
        )
        return [
            Broadcast(topic, row["event"], row["payload"].encode(), {"id": row["id"], "replayed": True}).message(
                join_ref
            )
            for row in reversed(rows)
        ]

    def publish(self, name: str, event: str, payload: Any, *, private: bool) -> None:
        """Send a broadcast that came over HTTP."""
        content = json.dumps(payload).encode()
        self._rooms.broadcast(name, Broadcast(PREFIX + name, event, content, text=True), private=private)
