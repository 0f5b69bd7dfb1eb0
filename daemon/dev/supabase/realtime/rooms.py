"""Who is listening where."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from daemon.dev.realtime.frames import Broadcast, Message
from daemon.dev.realtime.tokens import Claims

PREFIX = "realtime:"


@dataclass(eq=False, slots=True)
class Channel:
    """One client on one topic. `topic` is what the client calls it, `name` what the database does."""

    topic: str
    join_ref: str | None
    claims: Claims
    send: Callable[[Message | Broadcast], None]
    private: bool = False
    hears_itself: bool = False
    acknowledged: bool = False
    may_speak: bool = True
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.topic.removeprefix(PREFIX)

    def reply(self, ref: str | None, status: str, response: Mapping[str, Any]) -> None:
        payload = {"status": status, "response": response}
        self.send(Message(self.topic, "phx_reply", payload, ref, self.join_ref))

    def system(self, message: str, *, ok: bool, extension: str) -> None:
        """Tells what became of something that the client did not wait for."""
        payload = {
            "message": message,
            "status": "ok" if ok else "error",
            "extension": extension,
            "channel": self.name,
        }
        self.send(Message(self.topic, "system", payload, None, self.join_ref))

    def close(self) -> None:
        """Says that the client is no longer on the topic."""
        self.send(Message(self.topic, "phx_close", {}, self.join_ref, self.join_ref))


class Rooms:
    """All channels, by topic. A private topic and a public one of the same name are two."""

    def __init__(self) -> None:
        self._rooms: defaultdict[tuple[str, bool], list[Channel]] = defaultdict(list)

    def enter(self, channel: Channel) -> None:
        self._rooms[channel.name, channel.private].append(channel)

    def leave(self, channel: Channel) -> None:
        room = self._rooms[channel.name, channel.private]
        room.remove(channel)
        if not room:
            del self._rooms[channel.name, channel.private]

    def tell(self, name: str, broadcast: Broadcast, *, private: bool, speaker: Channel | None = None) -> None:
        """Sends a broadcast to everybody on a topic; to the one who speaks only if it wants that."""
        for channel in self._rooms.get((name, private), ()):
            if channel is not speaker or channel.hears_itself:
                channel.send(broadcast)
