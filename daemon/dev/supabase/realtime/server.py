"""What all connections share."""

from dataclasses import dataclass

import asyncpg

from daemon.dev.keys import Keys
from daemon.dev.realtime.changes import Changes
from daemon.dev.realtime.messages import Messages
from daemon.dev.realtime.rooms import Rooms


@dataclass(frozen=True, slots=True)
class Server:
    """The parts. `denial_delay` is how many seconds a refused client waits for its answer."""

    keys: Keys
    pool: "asyncpg.Pool[asyncpg.Record]"
    rooms: Rooms
    messages: Messages
    changes: Changes
    denial_delay: float
