"""A client's WebSocket: reads its messages, and keeps its channels."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import asyncpg
from starlette.websockets import WebSocket, WebSocketDisconnect

from daemon.dev.supabase.realtime.access import permissions
from daemon.dev.supabase.realtime.bindings import Binding, BindingRefused, parse_binding
from daemon.dev.supabase.realtime.frames import BadFrame, Broadcast, Message, Version
from daemon.dev.supabase.realtime.rooms import PREFIX, Channel
from daemon.dev.supabase.realtime.server import Server
from daemon.dev.supabase.realtime.tokens import Claims, TokenRefused, expired, read


class JoinRefused(Exception):
    """A join that is refused, with the reason for the client."""


class Connection:
    """A connected client.

    Args:
        server: The parts that connections share.
        websocket: Accepted already.
        version: Of the protocol that the client speaks.
        claims: Of the key that it has connected with; a join with a token replaces them.
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
        """Serve the client until it disconnects."""
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
        """Send the outgoing messages in order, in a task of its own: a slow client delays no other."""
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
            self._broadcast(message)
            return
        channel = self._channels.get(message.topic)
        match message.event:
            case "heartbeat":  # belongs to no join, whatever it names
                self._reply(replace(message, join_ref=None), "ok", {})
            case "phx_join":
                await self._join(message)
            case _ if channel is None:
                self._reply(message, *(("ok", {}) if message.event == "phx_leave" else _unmatched()))
            case "phx_leave":
                if channel.join_ref == message.join_ref:  # else it leaves a join that has been replaced
                    self._leave(message.topic)
                    channel.reply(message.ref, "ok", {})
                    channel.close()
            case "access_token":
                await self._renew(channel, message.payload.get("access_token"))
            case _:
                reason = f"NotImplemented: image-jobs dev does not have {message.event}."
                channel.reply(message.ref, "error", {"reason": reason})

    async def _join(self, message: Message) -> None:
        """Join a topic, or reply with the reason for a refusal. A second join to a topic replaces the first."""
        config = _object(message.payload.get("config"))
        try:
            channel = self._parse_join(message, config)
            bindings = [parse_binding(_object(each)) for each in _list(config.get("postgres_changes"))]
            if not await self._may_receive(channel):
                self._in_background(self._deny(message, _no_permission(channel)))
                return
            replayed = await self._replay(channel, _object(config.get("broadcast")).get("replay"))
        except (JoinRefused, TokenRefused, BindingRefused) as error:
            self._reply(message, "error", {"reason": str(error)})
            return
        replaced = self._channels.get(message.topic)
        channel.reply(message.ref, "ok", {"postgres_changes": [{"id": one.id, **one.config} for one in bindings]})
        if replaced is not None:
            self._leave(message.topic)
            replaced.close()
        self._enter(channel)
        for each in replayed:
            channel.send(each)
        if bindings:
            self._in_background(self._subscribe(channel, bindings))

    def _parse_join(self, message: Message, config: Mapping[str, Any]) -> Channel:
        """Make the channel of a join.

        Raises:
            JoinRefused: If its config is not valid, or not implemented.
            TokenRefused: If its token is not valid.
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
            self._claims_of(message.payload.get("access_token")),
            self._outgoing.put_nowait,
            private=bool(config.get("private")),
            receives_own=bool(broadcast.get("self")),
            acknowledged=bool(broadcast.get("ack")),
        )

    async def _replay(self, channel: Channel, replay: object) -> list[Message]:
        """Fetch the messages that a join replays.

        Raises:
            JoinRefused: If the parameters are not valid.
        """
        if not replay:
            return []
        try:
            return await self._server.messages.replay(channel.topic, channel.name, _object(replay), channel.join_ref)
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
        """Replace the token of a channel; one that is not valid ends the channel."""
        try:
            channel.claims = self._claims_of(token)
        except TokenRefused as error:
            self._end(channel, str(error))
            return
        if await self._may_receive(channel):
            self._watch_expiry(channel)
        else:
            self._end(channel, _no_permission(channel))

    def _broadcast(self, broadcast: Broadcast) -> None:
        channel = self._channels.get(broadcast.topic)
        if channel is None:
            self._reply(Message(broadcast.topic, "broadcast", {}, broadcast.ref, broadcast.join_ref), *_unmatched())
        elif channel.may_send:
            sent = Broadcast(
                broadcast.topic, broadcast.event, broadcast.payload, binary=broadcast.binary, text=broadcast.text
            )
            self._server.rooms.broadcast(channel.name, sent, private=channel.private, sender=channel)
            if channel.acknowledged:
                channel.reply(broadcast.ref, "ok", {})

    async def _may_receive(self, channel: Channel) -> bool:
        if not channel.private:
            return True
        receive, channel.may_send = await permissions(self._server.pool, channel.claims, channel.name)
        return receive

    async def _deny(self, message: Message, reason: str) -> None:
        """Refuse a join after the real server's delay."""
        await asyncio.sleep(self._server.denial_delay)
        self._reply(message, "error", {"reason": reason})

    def _claims_of(self, token: object) -> Claims:
        """Return the claims of a token; without one, or with one of the new keys, those of the connection."""
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
    """Return a client's value if it is an object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    """Return a client's value if it is a list, else an empty one."""
    return cast("list[object]", value) if isinstance(value, list) else []


def _unmatched() -> tuple[str, dict[str, str]]:
    return "error", {"reason": "unmatched topic"}


def _no_permission(channel: Channel) -> str:
    return f"Unauthorized: You do not have permissions to read from this Channel topic: {channel.name}"
