"""The parts that all connections share."""

from dataclasses import dataclass

import asyncpg

from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.realtime.changes import Changes
from daemon.dev.supabase.realtime.messages import Messages
from daemon.dev.supabase.realtime.rooms import Rooms


@dataclass(frozen=True, slots=True)
class Server:
    """The shared parts. `denial_delay`: seconds until the reply to a refused join."""

    keys: Keys
    pool: "asyncpg.Pool[asyncpg.Record]"
    rooms: Rooms
    messages: Messages
    changes: Changes
    denial_delay: float
