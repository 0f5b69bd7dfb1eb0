"""What is kept beside a stored picture: enough to settle its run with it, should the settlement be lost."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from daemon.images import ImageInfo
from daemon.providers import Generated
from daemon.queue import Claimed
from daemon.storage import StoredObject

LONGEST_PROMPT = 100_000
"""Characters of a revised prompt; Storage takes 1 MB of such words (`MAX_CUSTOM_METADATA_SIZE` in its source), in the
upload's form and not in a header."""


def words(run: Claimed, made: Generated, info: ImageInfo, extra: Sequence[str]) -> dict[str, str]:
    """The metadata of the object; `extra` has the keys of further pictures."""
    return {
        "request": request_hash(run),
        "ticket": str(run.ticket),
        "sha256": info.sha256,
        "width": str(info.width),
        "height": str(info.height),
        "cost": "" if made.cost is None else str(made.cost),
        "originalUrl": without_query(made.original_url) or "",
        "revisedPrompt": _plain(made.revised_prompt or "")[:LONGEST_PROMPT],
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


def payload(found: StoredObject) -> Mapping[str, Any]:
    """What the run's payload had said of the picture itself."""
    said = found.metadata
    return {
        "originalUrl": said.get("originalUrl") or None,
        "revisedPrompt": said.get("revisedPrompt") or None,
        "width": int(said.get("width", 0)) or None,
        "height": int(said.get("height", 0)) or None,
        "contentType": found.content_type,
        "bytes": found.size,
        "cost": float(cost) if (cost := said.get("cost")) else None,
    }


def request_hash(run: Claimed) -> str:
    """What makes two requests the same: processor and prompt."""
    text = json.dumps([run.processor, run.metadata.get("promptSpec")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def without_query(url: str | None) -> str | None:
    """A provider's URL without its query, which is often a signature."""
    return None if url is None else urlunsplit(urlsplit(url)._replace(query="", fragment=""))


def _plain(text: str) -> str:
    """As Postgres takes it, where Storage keeps it: without NUL and lone surrogates."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()
