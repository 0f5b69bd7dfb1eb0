"""The messages between the daemon and its children: a line of JSON for each job, and one for its result."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from daemon.images import ImageInfo


@dataclass(frozen=True, slots=True)
class Job:
    """An image file to decode once.

    Args:
        path: The file.
        max_bytes, max_pixels: Larger ones are refused.
        cpu_seconds: Processor time after which the child is ended by the system.
        thumbnail: The file to write a thumbnail to; None for none.
        quarters: A folder to write the four quarters of a grid to; None for none.
    """

    path: str
    max_bytes: int
    max_pixels: int
    cpu_seconds: int
    thumbnail: str | None = None
    quarters: str | None = None


@dataclass(frozen=True, slots=True)
class Quarter:
    """One picture that was cut out of a grid."""

    path: str
    info: ImageInfo


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image. Where it can be shown, but not all that was asked for could be made, `flaw` is a sentence that says why."""

    info: ImageInfo
    flaw: str | None = None
    quarters: tuple[Quarter, ...] = ()


@dataclass(frozen=True, slots=True)
class NoImage:
    """Not an image that can be shown; `reason` is Pillow's own."""

    message: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TooLarge:
    """More bytes or pixels than are allowed; `data` says how many."""

    message: str
    data: dict[str, int]


@dataclass(frozen=True, slots=True)
class DiskError:
    """The file cannot be read."""

    errno: int
    strerror: str


@dataclass(frozen=True, slots=True)
class Crashed:
    """A bug of ours."""

    traceback: str


Result = Decoded | NoImage | TooLarge | DiskError | Crashed


def dump(message: Job | Result) -> bytes:
    """Return a message as a line."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode() + b"\n"


def load(line: bytes) -> Job | Result:
    """Return the message of a line."""
    fields: dict[str, Any] = json.loads(line)
    kind = fields.pop("kind")
    if kind == Decoded.__name__:
        quarters = tuple(Quarter(each["path"], ImageInfo(**each["info"])) for each in fields["quarters"])
        return Decoded(ImageInfo(**fields["info"]), fields["flaw"], quarters)
    plain: dict[str, type[Job | NoImage | TooLarge | DiskError | Crashed]] = {
        each.__name__: each for each in (Job, NoImage, TooLarge, DiskError, Crashed)
    }
    return plain[kind](**fields)
