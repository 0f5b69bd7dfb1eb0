"""A decoder of the logical replication stream of Postgres' plugin `pgoutput` (protocol version 1)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_KINDS: Mapping[str, Literal["INSERT", "UPDATE", "DELETE"]] = {"I": "INSERT", "U": "UPDATE", "D": "DELETE"}

Row = Mapping[str, str | None]
"""Values as text, by column. A missing value was too large to be logged again, and has not changed."""


@dataclass(frozen=True, slots=True)
class Change:
    """An inserted, updated or deleted row. `old` has the columns of the replica identity, if there are any."""

    kind: Literal["INSERT", "UPDATE", "DELETE"]
    table: int
    new: Row
    old: Row
    committed_at: datetime

    @property
    def size(self) -> int:
        """The approximate number of bytes in the log."""
        return sum(len(value.encode()) for value in (*self.new.values(), *self.old.values()) if value is not None)


def decode(messages: Iterable[bytes]) -> Iterator[Change]:
    """Decode a batch of messages. Each batch describes its tables anew."""
    columns: dict[int, list[tuple[str, bool]]] = {}
    committed_at = _EPOCH
    for message in messages:
        reader = _Reader(message)
        match kind := reader.letter():
            case "B":
                reader.number(8)
                committed_at = _EPOCH + timedelta(microseconds=reader.number(8))
            case "R":
                table = reader.number(4)
                columns[table] = reader.columns()
            case "I" | "U" | "D":
                table = reader.number(4)
                new, old = reader.rows(columns[table])
                yield Change(_KINDS[kind], table, new, old, committed_at)
            case _:
                continue


class _Reader:
    def __init__(self, message: bytes) -> None:
        self._message = message
        self._at = 0

    def letter(self) -> str:
        return self._take(1).decode()

    def number(self, size: int) -> int:
        return int.from_bytes(self._take(size))

    def columns(self) -> list[tuple[str, bool]]:
        """Read the columns of a relation: name, and whether it is in the replica identity."""
        for _ in ("schema", "table"):
            self._text()
        self._take(1)  # the kind of replica identity
        found: list[tuple[str, bool]] = []
        for _ in range(self.number(2)):
            in_key = self._take(1) == b"\1"
            found.append((self._text(), in_key))
            self._take(8)  # type and its modifier
        return found

    def rows(self, columns: list[tuple[str, bool]]) -> tuple[Row, Row]:
        """Read the new row, and the logged part of the old one."""
        new: Row = {}
        old: Row = {}
        while self._at < len(self._message):
            kind = self.letter()
            row = self._row(columns)
            if kind == "N":
                new = row
            else:
                old = {name: row[name] for name, in_key in columns if name in row and (in_key or kind == "O")}
        return new, old

    def _row(self, columns: list[tuple[str, bool]]) -> Row:
        row: dict[str, str | None] = {}
        self._take(2)  # the number of columns, which is known
        for name, _ in columns:
            match self.letter():
                case "n":
                    row[name] = None
                case "t":
                    row[name] = self._take(self.number(4)).decode()
                case _:  # "u": unchanged, and not in the log
                    continue
        return row

    def _text(self) -> str:
        end = self._message.index(0, self._at)
        text = self._message[self._at : end].decode()
        self._at = end + 1
        return text

    def _take(self, size: int) -> bytes:
        self._at += size
        return self._message[self._at - size : self._at]
