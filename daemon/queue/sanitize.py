"""The door to the database: makes settlements, progress and reasons writable, and removes secrets from their words.

Providers and users may say whatever the database refuses: NUL, lone surrogates, numbers without end, files as base64, a
megabyte of text. A refused settlement is a picture that was paid for and is lost, so such parts are shortened or left out,
one by one, and a warning event names them. Structure (ids, claims, processors, provider job ids, codes, costs, our URLs)
has the first right to the room there is, and is never masked: a run with the id `sk-…` is settled by that id.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from json.encoder import encode_basestring
from typing import Any, cast
from uuid import NAMESPACE_OID, uuid5

from daemon.queue.base64_rule import (
    ALLOWED,
    SHORTEST_TOKEN,
    break_data_urls,
    count,
    has_data_url,
    shorten_tokens,
)

DEEPEST = 64
"""Levels of nesting; a response may be made to break readers."""
MAX_BYTES = 1_000_000
"""Of the text of one column's value: below the 1 MiB of a row, with room for what the database adds."""
MAX_SHOWN_BYTES = 4_000
"""Of a text that the canvas shows: it goes out with every change of the node."""
MAX_SHOWN_TOKENS = ALLOWED // 4
"""Of such a text: it shares the node's data with the other, the run's id and the frontend's own."""
MAX_NAME = 40
"""Characters of a name in the warning: too short to be a token."""
LONGEST_WAIT = 366 * 86_400.0
"""Seconds until a run is due; the database's clock ends somewhere."""

OURS = frozenset(
    [
        "processor",
        "provider",
        "model",
        "requestedModel",
        "requested",
        "effective",
        "runId",
        "workflowId",
        "nodeId",
        "providerJobId",
        "taskId",
        "imageUrl",
        "thumbnailUrl",
        "previewUrl",
        "imagePath",
        "thumbnailPath",
        "previewPath",
        "keptPath",
        "images",
        "imagePaths",
        "contentType",
    ]
)
"""Names, in a payload, its details and an event's data, whose texts are ours, or have to be found again as they are."""
STRUCTURE = OURS | {"code"}
"""Of a payload itself: there the code is a word of ours, elsewhere the provider's."""
SHOWN = frozenset({"error", "hint", "message"})
"""Names whose texts are shown on the canvas."""

Mask = Callable[[str], str]
Refuse = Callable[[], None]
"""Called for each text with a file in it, as base64."""
Json = dict[str, Any]


def sanitize_text(text: str, mask: Mask) -> str:
    """Return a text that is shown to people, without secrets, and writable into a column of its own."""
    return _Column(mask).shown(text)


def sanitize_settlement(settlement: Mapping[str, Any], mask: Mask, refuse: Refuse = lambda: None) -> Json:
    """Return a settlement that the database can take; see `image_jobs.settle_runs`."""
    return _sanitize(settlement, mask, refuse)


def sanitize_progress(entry: Mapping[str, Any], mask: Mask, refuse: Refuse = lambda: None) -> Json:
    """Return a progress entry that the database can take; see `image_jobs.record_progress`."""
    return _sanitize(entry, mask, refuse)


def sanitize_charge(charge: Mapping[str, Any]) -> Json:
    """Return state and cost of a call as the database can take them: a cost that is no number is not known."""
    return {name: _Column(str).value(value) for name, value in charge.items()}


def _sanitize(entry: Mapping[str, Any], mask: Mask, refuse: Refuse) -> Json:
    """Return the entry with each column's value made writable by itself. Names that are not known here are structure."""
    shortened: dict[str, None] = {}
    written: Json = {}
    for name, value in entry.items():
        match name, value:
            case "events", list() | tuple():
                written[name] = [_event(event, mask, refuse, shortened) for event in cast("Sequence[Json]", value)]
            case "if_lost", Mapping():
                written[name] = _event(cast("Json", value), mask, refuse, {})
            case "payload", Mapping():
                written[name] = _Column(mask, refuse).record(cast("Json", value), shortened, STRUCTURE)
            case "message", str():
                column = _Column(mask, refuse)
                written[name] = column.shown(value)
                shortened |= dict.fromkeys([name] if column.shortened else [])
            case "due_in", int() | float():
                written[name] = None if math.isnan(value) else min(max(value, 0.0), LONGEST_WAIT)
            case "progress", int() | float():
                written[name] = round(min(max(value, 0), 100)) if math.isfinite(value) else None
            case _, str():  # into columns of their own, which have no such rule: a provider job id may look like base64
                written[name] = _Column(str).clean(value)
            case _:
                written[name] = _Column(str).value(value)
    if shortened:
        events = cast("list[Json]", written.get("events") or [])
        written["events"] = [*events, _warning(entry, list(shortened))]
    return written


def _event(event: Mapping[str, Any], mask: Mask, refuse: Refuse, shortened: dict[str, None]) -> Json:
    """Return an event whose payload the database can take; the names of what was shortened are added to `shortened`."""
    payload = cast("Mapping[str, Any]", event["payload"])
    column = _Column(mask, refuse)
    parts: dict[str, None] = {}
    data = payload.get("data")
    written: Json = {"event": column.value(payload.get("event"))}
    if isinstance(data, Mapping):
        # Before the message: some of it is read again, by adoption and the views of costs.
        data = column.record(cast("Json", data), parts)
    written["message"] = column.shown(str(payload.get("message")))
    if column.shortened:
        parts["message"] = None
    if data is not None:
        written["data"] = data
    shortened |= {f"{written['event']}: {part}": None for part in parts}
    return {**event, "payload": written}


def _warning(entry: Mapping[str, Any], fields: Sequence[str]) -> Json:
    """Return the event that names what was shortened. The same entry again has the same event, with the same id."""
    text = ", ".join(fields)[: MAX_SHOWN_BYTES // 4]
    message = f"The database cannot hold all of this, so it was shortened or left out: {text}."
    data: Json = {"fields": list(fields)[:20]}
    if _holds_file(entry):
        data["base64"] = True  # of which an alert is made
    return {
        "id": str(uuid5(NAMESPACE_OID, f"{entry.get('claim')} {entry.get('outcome')} {text}")),
        "kind": "error" if "base64" in data else "log",
        "payload": {"event": "warning", "message": message, "data": data},
    }


def _holds_file(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry has base64 that the database refuses."""
    texts = list(_texts(entry))
    return any(map(has_data_url, texts)) or sum(map(count, texts)) > ALLOWED


def _texts(value: object, depth: int = 0) -> Iterator[str]:
    """Yield the texts within a value, as far in as they would be written."""
    match value:
        case str():
            yield value
        case Mapping() if depth <= DEEPEST:
            for inner in cast("Mapping[object, object]", value).values():
                yield from _texts(inner, depth + 1)
        case list() | tuple() if depth <= DEEPEST:
            for inner in cast("Sequence[object]", value):
                yield from _texts(inner, depth + 1)
        case _:
            return


@dataclass(slots=True)
class _Column:
    """The value of one column, while it is made writable: what room is left in it."""

    mask: Mask
    refuse: Refuse = lambda: None
    tokens: int = ALLOWED
    bytes: int = MAX_BYTES
    shortened: bool = field(default=False)
    """Whether something did not fit, since this was last set to False."""

    def record(
        self, fields: Mapping[str, Any], shortened: dict[str, None], structure: frozenset[str] = OURS, depth: int = 0
    ) -> Json:
        """Return an object that code of ours has made: structure first, as it is, then the sentences, then the rest.

        Args:
            fields: Its fields.
            shortened: Takes the names of those that did not fit.
            structure: The names of those that are not masked.
            depth: How deep the object lies.
        """
        written: Json = {}
        names: dict[str, str] = {}
        for name in sorted(fields, key=lambda name: (name not in structure, name not in SHOWN, name == "details")):
            self.shortened = False
            key = names[name] = self._key(str(name))
            written[key] = self._field(name, fields[name], structure, depth + 1)
            if self.shortened:
                shortened[key[:MAX_NAME]] = None
        self.shortened = False
        return {names[name]: written[names[name]] for name in fields}

    def _field(self, name: str, value: object, structure: frozenset[str], depth: int) -> object:
        if name in structure:
            mask, self.mask = self.mask, str
            unmasked = self.value(value, depth)
            self.mask = mask
            return unmasked
        if name in SHOWN and isinstance(value, str):
            return self.shown(value)
        if name == "details" and isinstance(value, Mapping):
            inner: dict[str, None] = {}
            details = self.record(cast("Json", value), inner, depth=depth)
            self.shortened = bool(inner)
            return details
        return self.value(value, depth)

    def shown(self, text: str) -> str:
        """Return a text that is shown on the canvas."""
        return self._fit(self.clean(text), min(self.tokens, MAX_SHOWN_TOKENS), min(self.bytes, MAX_SHOWN_BYTES))

    def value(self, value: object, depth: int = 0) -> object:
        """Return any value as JSON that fits; a type that JSON lacks becomes a text."""
        match value:
            case None | bool():
                self.bytes -= 6
                return value
            case int() | float():
                return self._number(value)
            case Mapping() if depth <= DEEPEST:
                return self._object(cast("Mapping[object, object]", value), depth)
            case list() | tuple() if depth <= DEEPEST:
                return self._list(cast("Sequence[object]", value), depth)
            case Mapping() | list() | tuple():
                self.shortened = True
                return "…"
            case _:
                return self._fit(self.clean(str(value)), self.tokens, self.bytes)

    def _object(self, value: Mapping[object, object], depth: int) -> Json:
        written: Json = {}
        self.bytes -= 2
        for key, item in value.items():
            if self.bytes <= 0:
                self.shortened = True
                break
            written[self._key(str(key))] = self.value(item, depth + 1)
        return written

    def _list(self, value: Sequence[object], depth: int) -> list[object]:
        written: list[object] = []
        self.bytes -= 2
        for item in value:
            if self.bytes <= 0:
                self.shortened = True
                break
            written.append(self.value(item, depth + 1))
        return written

    def _key(self, key: str) -> str:
        """Return a name of a foreign object. A plain word is no secret, also where a key of somebody's is `openai`."""
        self.bytes -= 4
        if len(key) <= 40 and key.isascii() and key.replace("_", "").isalpha():
            self.bytes -= len(key)
            return key
        return self._fit(self.clean(key), self.tokens, self.bytes)

    def _number(self, value: float) -> float | None:
        """Return a number that JSON and Postgres can hold, which writes all its digits; None for others."""
        self.bytes -= 24
        if isinstance(value, float) and not math.isfinite(value):
            self.shortened = True
            return None
        if value == 0 or 1e-30 < abs(value) < 1e40:
            return value
        if abs(value) >= 10**400:
            self.shortened = True
            return None
        digits = str(value) if isinstance(value, int) else format(Decimal(repr(value)), "f")
        encoded = count(digits)
        if encoded > self.tokens:
            self.shortened = True
            return None
        self.tokens -= encoded
        self.bytes -= len(digits)
        return value

    def clean(self, text: str) -> str:
        """Return a text without NUL, lone surrogates and secrets."""
        if "\x00" in text:
            text = text.replace("\x00", "")
        return self.mask(text if text.isascii() else text.encode("utf-8", "replace").decode())

    def _fit(self, text: str, tokens: int, size: int) -> str:
        """Return the text without a file in it, and no larger than there is room for."""
        fitting = break_data_urls(text)
        encoded = count(fitting) if len(fitting) >= SHORTEST_TOKEN else 0
        if encoded > tokens or fitting != text:
            self.refuse()
        if encoded > tokens:
            fitting = shorten_tokens(fitting, tokens)
            encoded = count(fitting)
        length = _json_bytes(fitting)
        if length > size:
            fitting = shorten_tokens(_cut(fitting, max(size, 0)) + "…", tokens)
            length, encoded = _json_bytes(fitting), count(fitting)
        self.shortened |= fitting != text
        self.tokens -= encoded
        self.bytes -= length
        return fitting


def _cut(text: str, size: int) -> str:
    """Return the start of a text that takes up to `size` bytes as JSON."""
    text = text[:size]
    while text and (length := _json_bytes(text)) > size:
        text = text[: min(len(text) - 1, len(text) * size // length)]
    return text


def _json_bytes(text: str) -> int:
    quoted = encode_basestring(text)
    return len(quoted) + 2 if quoted.isascii() else len(quoted.encode()) + 2
