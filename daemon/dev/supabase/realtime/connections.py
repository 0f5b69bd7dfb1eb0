"""One client's WebSocket: what it sends, and the channels it has joined."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, cast

import asyncpg
from starlette.websockets import WebSocket, WebSocketDisconnect

from daemon.dev.realtime.access import permissions
from daemon.dev.realtime.bindings import Binding, BindingRefused, binding
from daemon.dev.realtime.frames import BadFrame, Broadcast, Message, Version
from daemon.dev.realtime.rooms import PREFIX, Channel
from daemon.dev.realtime.server import Server
from daemon.dev.realtime.tokens import Claims, TokenRefused, expired, read


class JoinRefused(Exception):
    """Why a join is refused, as the client is told."""


class Connection:
    """A connected client.

    Args:
        server: What it is connected to.
        websocket: Accepted already.
        version: Of the protocol that the client speaks.
        claims: Of the key that it came with: it acts as that until it joins with a token.
    """

    def __init__(self, server: Server, websocket: WebSocket, version: Version, claims: Claims) -> None:
        self._server = server
        self._websocket = websocket
        self._version = version
        self._claims = claims
        self._channels: dict[str, Channel] = {}
        self._expiries: dict[str, asyncio.TimerHandle] = {}
        self._outgoing: asyncio.Queue[Message | Broadcast] = asyncio.Queue()
        self._later: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serves the client until it goes away."""
        writer = asyncio.create_task(self._write(), name="realtime writer")
        self._later.add(writer)
        try:
            while (received := await self._websocket.receive())["type"] == "websocket.receive":
                text = received.get("text")
                await self._handle(received["bytes"] if text is None else text)
        finally:
            for topic in list(self._channels):
                self._leave(topic)
            for each in self._later:
                each.cancel()
            await asyncio.gather(*self._later, return_exceptions=True)

    async def _write(self) -> None:
        """Sends what there is to send, in order, so that nobody has to wait for a slow client."""
        while True:
            frame = self._version.write(await self._outgoing.get())
            try:
                if isinstance(frame, str):
                    await self._websocket.send_text(frame)
                elif frame is not None:
                    await self._websocket.send_bytes(frame)
            except (WebSocketDisconnect, RuntimeError):  # it has gone away, which the reading side notices too
                return

    async def _handle(self, frame: str | bytes) -> None:
        try:
            message = self._version.read(frame)
        except BadFrame:
            return
        if isinstance(message, Broadcast):
            self._speak(message)
            return
        channel = self._channels.get(message.topic)
        match message.event:
            case "heartbeat":
                self._reply(message, "ok", {})
            case "phx_join":
                await self._join(message)
            case _ if channel is None:
                self._reply(message, *(("ok", {}) if message.event == "phx_leave" else _unmatched()))
            case "phx_leave":
                if channel.join_ref == message.join_ref:  # else it is about a join that has been replaced since
                    self._leave(message.topic)
                    channel.reply(message.ref, "ok", {})
                    channel.close()
            case "access_token":
                await self._renew(channel, message.payload.get("access_token"))
            case _:
                reason = f"NotImplemented: image-jobs dev does not have {message.event}."
                channel.reply(message.ref, "error", {"reason": reason})

    async def _join(self, message: Message) -> None:
        """Joins, or says why not. A second join to a topic takes the place of the first."""
        config = _object(message.payload.get("config"))
        try:
            channel = self._asked(message, config)
            bindings = [binding(_object(asked)) for asked in _list(config.get("postgres_changes"))]
            if not await self._may_hear(channel):
                self._in_background(self._deny(message, _no_permission(channel)))
                return
            past = await self._past(channel, _object(config.get("broadcast")).get("replay"))
        except (JoinRefused, TokenRefused, BindingRefused) as error:
            self._reply(message, "error", {"reason": str(error)})
            return
        replaced = self._channels.get(message.topic)
        channel.reply(message.ref, "ok", {"postgres_changes": [{"id": one.id, **one.asked} for one in bindings]})
        if replaced is not None:
            self._leave(message.topic)
            replaced.close()
        self._enter(channel)
        for each in past:
            channel.send(each)
        if bindings:
            self._in_background(self._subscribe(channel, bindings))

    def _asked(self, message: Message, config: Mapping[str, Any]) -> Channel:
        """The channel that a join asks for.

        Raises:
            JoinRefused: If it is not to be had.
            TokenRefused: If it comes with a token that is none of ours.
        """
        broadcast, presence = _object(config.get("broadcast")), _object(config.get("presence"))
        if not message.topic.startswith(PREFIX) or message.topic == PREFIX:
            raise JoinRefused("TopicNameRequired: You must provide a topic name")
        if presence.get("enabled"):
            raise JoinRefused("NotImplemented: image-jobs dev does not have presence.")
        if broadcast.get("replay") and not config.get("private"):
            raise JoinRefused("UnableToReplayMessages: Replay is not allowed for public channels")
        return Channel(
            message.topic,
            message.join_ref or message.ref,
            self._claimed(message.payload.get("access_token")),
            self._outgoing.put_nowait,
            private=bool(config.get("private")),
            hears_itself=bool(broadcast.get("self")),
            acknowledged=bool(broadcast.get("ack")),
        )

    async def _past(self, channel: Channel, replay: object) -> list[Message]:
        """The messages that a join wants to hear once more.

        Raises:
            JoinRefused: If it says so in a way that nobody understands.
        """
        if not replay:
            return []
        try:
            return await self._server.messages.past(channel.topic, channel.name, _object(replay), channel.join_ref)
        except (TypeError, ValueError, asyncpg.DataError):
            raise JoinRefused("UnableToReplayMessages: Replay params are not valid") from None

    async def _subscribe(self, channel: Channel, bindings: list[Binding]) -> None:
        try:
            await self._server.changes.subscribe(channel, bindings)
        except BindingRefused as error:
            channel.system(str(error), ok=False, extension="postgres_changes")
            return
        if self._channels.get(channel.topic) is channel:
            channel.system("Subscribed to PostgreSQL", ok=True, extension="postgres_changes")
        else:
            self._server.changes.unsubscribe(channel)

    async def _renew(self, channel: Channel, token: object) -> None:
        """Takes a new token; one that does not hold ends the channel."""
        try:
            channel.claims = self._claimed(token)
        except TokenRefused as error:
            self._end(channel, str(error))
            return
        if await self._may_hear(channel):
            self._watch_expiry(channel)
        else:
            self._end(channel, _no_permission(channel))

    def _speak(self, broadcast: Broadcast) -> None:
        channel = self._channels.get(broadcast.topic)
        if channel is None:
            self._reply(Message(broadcast.topic, "broadcast", {}, broadcast.ref, broadcast.join_ref), *_unmatched())
        elif channel.may_speak:
            said = Broadcast(
                broadcast.topic, broadcast.event, broadcast.payload, binary=broadcast.binary, text=broadcast.text
            )
            self._server.rooms.tell(channel.name, said, private=channel.private, speaker=channel)
            if channel.acknowledged:
                channel.reply(broadcast.ref, "ok", {})

    async def _may_hear(self, channel: Channel) -> bool:
        if not channel.private:
            return True
        hear, channel.may_speak = await permissions(self._server.pool, channel.claims, channel.name)
        return hear

    async def _deny(self, message: Message, reason: str) -> None:
        """Lets the client wait, as the real server does."""
        await asyncio.sleep(self._server.denial_delay)
        self._reply(message, "error", {"reason": reason})

    def _claimed(self, token: object) -> Claims:
        """Who a token is; without one, or with one of the new keys, whoever connected."""
        if not isinstance(token, str) or not token or token.startswith("sb_"):
            return self._claims
        return read(self._server.keys, token)

    def _enter(self, channel: Channel) -> None:
        self._channels[channel.topic] = channel
        self._server.rooms.enter(channel)
        self._watch_expiry(channel)

    def _leave(self, topic: str) -> None:
        channel = self._channels.pop(topic)
        self._server.rooms.leave(channel)
        self._server.changes.unsubscribe(channel)
        if expiry := self._expiries.pop(topic, None):
            expiry.cancel()

    def _watch_expiry(self, channel: Channel) -> None:
        if expiry := self._expiries.pop(channel.topic, None):
            expiry.cancel()
        if (at := channel.claims.get("exp")) is not None:
            reason = f"InvalidJWTToken: {expired(time.time())}"
            later = asyncio.get_running_loop().call_later
            self._expiries[channel.topic] = later(float(at) - time.time(), self._end, channel, reason)

    def _end(self, channel: Channel, reason: str) -> None:
        if self._channels.get(channel.topic) is channel:
            self._leave(channel.topic)
        channel.system(reason, ok=False, extension="system")
        channel.close()

    def _reply(self, message: Message, status: str, response: Mapping[str, Any]) -> None:
        payload = {"status": status, "response": response}
        self._outgoing.put_nowait(Message(message.topic, "phx_reply", payload, message.ref, message.join_ref))

    def _in_background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)


def _object(value: object) -> Mapping[str, Any]:
    """What a client has sent, if it is an object."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    """What a client has sent, if it is a list."""
    return cast("list[object]", value) if isinstance(value, list) else []


def _unmatched() -> tuple[str, dict[str, str]]:
    return "error", {"reason": "unmatched topic"}


def _no_permission(channel: Channel) -> str:
    return f"Unauthorized: You do not have permissions to read from this Channel topic: {channel.name}"
