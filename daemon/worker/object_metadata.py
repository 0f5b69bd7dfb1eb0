"""What is written beside a stored picture: enough to settle its run with it, should the settlement be lost.

It may be read by whoever may see the picture. So what it cost and which words it was drawn from are
not there: they are in the run's event `generated`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from daemon.images import ImageInfo
from daemon.queue import Claimed
from daemon.storage import StoredObject


def describe(run: Claimed, info: ImageInfo, extra: Sequence[str]) -> dict[str, str]:
    """The metadata of a picture's object; `extra` has the keys of further pictures."""
    return {
        "request": request_hash(run),
        "ticket": str(run.ticket),
        "sha256": info.sha256,
        "width": str(info.width),
        "height": str(info.height),
        "extra": " ".join(extra),
    }


def is_for(run: Claimed, found: StoredObject) -> bool:
    """Whether it was made for the very same request, since the last requeue."""
    return found.metadata.get("request") == request_hash(run) and found.metadata.get("ticket") == str(run.ticket)


def sha256(found: StoredObject) -> str:
    """Of the picture's bytes, hexadecimal."""
    return found.metadata.get("sha256", "")


def extra_keys(found: StoredObject) -> list[str]:
    """Where its further pictures lie."""
    return found.metadata.get("extra", "").split()


def payload(run: Claimed, found: StoredObject) -> Mapping[str, Any]:
    """What the run's payload had said of the picture itself."""
    made, said = run.made or {}, found.metadata
    return {
        "originalUrl": made.get("originalUrl"),
        "revisedPrompt": made.get("revisedPrompt"),
        "width": int(said.get("width", 0)) or None,
        "height": int(said.get("height", 0)) or None,
        "contentType": found.content_type,
        "bytes": found.size,
        "cost": made.get("cost"),
    }


def request_hash(run: Claimed) -> str:
    """What makes two requests the same: processor and prompt."""
    text = json.dumps([run.processor, run.metadata.get("promptSpec")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
