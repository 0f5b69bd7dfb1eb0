"""The wire format of messages, in both versions of the protocol.

1.0.0 (realtime-py) sends JSON objects. 2.0.0 (realtime-js) sends JSON arrays, and broadcasts as binary frames: lengths of
a byte each, then what they are the lengths of, then the payload.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

_PUSH, _BROADCAST = 3, 4
_JSON = 1
_LONGEST = 255


class BadFrame(Exception):
    """A frame that is not a message."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message that is not a broadcast. A reply has the `ref` of its request."""

    topic: str
    event: str
    payload: Mapping[str, Any]
    ref: str | None = None
    join_ref: str | None = None


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A message from one client to the others, or from the database to all of them.

    `payload` is JSON unless it is `binary`. A broadcast that came as `text` is sent as text in both versions, as by the
    real server. `ref` and `join_ref` are those of the sender.
    """

    topic: str
    event: str
    payload: bytes
    meta: Mapping[str, Any] | None = None
    binary: bool = False
    text: bool = False
    ref: str | None = None
    join_ref: str | None = None

    def message(self, join_ref: str | None = None) -> Message:
        """Convert it to a message of JSON."""
        payload: dict[str, Any] = {"event": self.event, "payload": json.loads(self.payload), "type": "broadcast"}
        if self.meta is not None:
            payload["meta"] = self.meta
        return Message(self.topic, "broadcast", payload, join_ref=join_ref)


class Version(Protocol):
    """One version of the protocol."""

    def read(self, frame: str | bytes) -> Message | Broadcast:
        """Parse a frame.

        Raises:
            BadFrame: If it is not a message.
        """
        ...

    def write(self, message: Message | Broadcast) -> str | bytes | None:
        """Format a message; None if this version has no frame for it."""
        ...


class Version1:
    """1.0.0."""

    def read(self, frame: str | bytes) -> Message | Broadcast:
        if isinstance(frame, bytes):
            raise BadFrame
        value = _parsed(frame)
        if not isinstance(value, dict):
            raise BadFrame
        fields = cast("dict[str, Any]", value)
        return _message(*(fields.get(name) for name in ("join_ref", "ref", "topic", "event", "payload")))

    def write(self, message: Message | Broadcast) -> str | bytes | None:
        if isinstance(message, Broadcast):
            if message.binary:
                return None
            message = message.message()
        return _compact(
            {"ref": message.ref, "event": message.event, "topic": message.topic, "payload": message.payload}
        )


class Version2:
    """2.0.0."""

    def read(self, frame: str | bytes) -> Message | Broadcast:
        if isinstance(frame, bytes):
            return _read_push(frame)
        value = _parsed(frame)
        if not isinstance(value, list) or len(fields := cast("list[Any]", value)) != 5:
            raise BadFrame
        return _message(*fields)

    def write(self, message: Message | Broadcast) -> str | bytes | None:
        if isinstance(message, Broadcast):
            if not message.text and (frame := _write_broadcast(message)) is not None:
                return frame
            if message.binary:
                return None
            message = message.message()
        return _compact([message.join_ref, message.ref, message.topic, message.event, message.payload])


VERSIONS: Mapping[str, Version] = {"1.0.0": Version1(), "2.0.0": Version2()}


def _message(join_ref: Any, ref: Any, topic: Any, event: Any, payload: Any) -> Message | Broadcast:
    if not (isinstance(topic, str) and isinstance(event, str) and isinstance(payload, dict)):
        raise BadFrame
    given = cast("dict[str, Any]", payload)
    ref, join_ref = (None if each is None else str(each) for each in (ref, join_ref))
    if event == "broadcast" and isinstance(given.get("event"), str):
        content = _compact(given.get("payload", {})).encode()
        return Broadcast(topic, given["event"], content, text=True, ref=ref, join_ref=join_ref)
    return Message(topic, event, given, ref, join_ref)


def _read_push(frame: bytes) -> Broadcast:
    if len(frame) < 7 or frame[0] != _PUSH:
        raise BadFrame
    parts: list[str] = []
    at = 7
    try:
        for length in frame[1:6]:
            parts.append(frame[at : at + length].decode())
            at += length
        if frame[6] == _JSON:
            json.loads(frame[at:])
    except ValueError:
        raise BadFrame from None
    join_ref, ref, topic, event, _ = parts
    return Broadcast(topic, event, frame[at:], binary=frame[6] != _JSON, ref=ref or None, join_ref=join_ref or None)


def _write_broadcast(broadcast: Broadcast) -> bytes | None:
    """Format a binary frame; None if a name is too long for one."""
    meta = _compact(broadcast.meta) if broadcast.meta else ""
    parts = [broadcast.topic.encode(), broadcast.event.encode(), meta.encode()]
    if any(len(part) > _LONGEST for part in parts):
        return None
    encoding = 0 if broadcast.binary else _JSON
    return bytes([_BROADCAST, *map(len, parts), encoding]) + b"".join(parts) + broadcast.payload


def _parsed(frame: str) -> object:
    try:
        return json.loads(frame)
    except (ValueError, RecursionError):
        raise BadFrame from None


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
