"""Channels, by topic."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from daemon.dev.supabase.realtime.frames import Broadcast, Message
from daemon.dev.supabase.realtime.limits import RateLimit
from daemon.dev.supabase.realtime.tokens import Claims

PREFIX = "realtime:"


@dataclass(eq=False, slots=True)
class Channel:
    """One client on one topic. `topic` is the client's name of it, `name` the database's, without the prefix."""

    topic: str
    join_ref: str | None
    claims: Claims
    send: Callable[[Message | Broadcast], None]
    private: bool = False
    receives_own: bool = False
    acknowledged: bool = False
    may_send: bool = True
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.topic.removeprefix(PREFIX)

    def reply(self, ref: str | None, status: str, response: Mapping[str, Any]) -> None:
        payload = {"status": status, "response": response}
        self.send(Message(self.topic, "phx_reply", payload, ref, self.join_ref))

    def system(self, message: str, *, ok: bool, extension: str) -> None:
        """Send a system message: the result of something that the join's reply does not wait for."""
        payload = {
            "message": message,
            "status": "ok" if ok else "error",
            "extension": extension,
            "channel": self.name,
        }
        self.send(Message(self.topic, "system", payload, None, self.join_ref))

    def close(self) -> None:
        """Send the end of the channel."""
        self.send(Message(self.topic, "phx_close", {}, self.join_ref, self.join_ref))


class Rooms:
    """All channels, by topic. A private topic and a public one of the same name are different.

    Args:
        limit: Of the project's messages.
    """

    def __init__(self, limit: RateLimit) -> None:
        self._limit = limit
        self._rooms: defaultdict[tuple[str, bool], list[Channel]] = defaultdict(list)

    def enter(self, channel: Channel) -> None:
        self._rooms[channel.name, channel.private].append(channel)

    def leave(self, channel: Channel) -> None:
        room = self._rooms[channel.name, channel.private]
        room.remove(channel)
        if not room:
            del self._rooms[channel.name, channel.private]

    def broadcast(self, name: str, broadcast: Broadcast, *, private: bool, sender: Channel | None = None) -> None:
        """Send a broadcast to all channels of a topic; to the sender's only if it has `receives_own`."""
        for channel in self._rooms.get((name, private), ()):
            if (channel is not sender or channel.receives_own) and self._limit.admits():
                channel.send(broadcast)
