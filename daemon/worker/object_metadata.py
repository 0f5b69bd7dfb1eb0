"""The metadata of a stored picture: enough to settle its run with it, should the settlement be lost.

It may be read by everyone who may see the picture. So the prompt it was drawn from is not there: that is in the run's event
`generated`. Its call and its cost are, for the books must know them wherever the picture is found.
"""

import hashlib
import json
from collections.abc import Sequence

from daemon.calls import Call
from daemon.images import ImageInfo
from daemon.run import ClaimedRun
from daemon.storage.objects import StoredObject
from daemon.worker.outcomes import Picture


def ours(run: ClaimedRun) -> dict[str, str]:
    """Return what every object of a run says of itself: an application may have files of its own in the bucket."""
    return {"image_jobs": run.id}


def describe(run: ClaimedRun, info: ImageInfo, extra: Sequence[str], cost: float | None) -> dict[str, str]:
    """Return the metadata of a picture's object.

    Args:
        run: The run.
        info: What the picture is.
        extra: The keys of further pictures.
        cost: USD; None where not known.
    """
    return {
        "call": str(run.call),
        "cost": "" if cost is None else repr(cost),
        "request": request_hash(run),
        "ticket": str(run.ticket),
        "sha256": info.sha256,
        "width": str(info.width),
        "height": str(info.height),
        "extra": " ".join(extra),
    }


def is_for(run: ClaimedRun, found: StoredObject) -> bool:
    """Return whether a picture was made for the very same request, since the last requeue."""
    return found.metadata.get("request") == request_hash(run) and found.metadata.get("ticket") == str(run.ticket)


def sha256(found: StoredObject) -> str:
    """Return the hash of the picture's bytes, hexadecimal."""
    return found.metadata.get("sha256", "")


def extra_keys(found: StoredObject) -> list[str]:
    """Return the keys of its further pictures."""
    return found.metadata.get("extra", "").split()


def call(found: StoredObject) -> Call | None:
    """Return the call that drew a picture; None where its metadata do not say."""
    number = found.metadata.get("call", "")
    return Call(id=int(number), state="charged", cost=_cost(found), image=True) if number.isdecimal() else None


def picture(run: ClaimedRun, found: StoredObject) -> Picture:
    """Return the picture as its own attempt would have settled it."""
    generated, metadata = run.generated or {}, found.metadata
    return Picture(
        original_url=generated.get("originalUrl"),
        revised_prompt=generated.get("revisedPrompt"),
        width=int(metadata.get("width", 0)) or None,
        height=int(metadata.get("height", 0)) or None,
        content_type=found.content_type,
        bytes=found.size,
        cost=_cost(found),
        seed=generated.get("seed"),
        quality=generated.get("quality"),
    )


def _cost(found: StoredObject) -> float | None:
    try:
        return float(found.metadata.get("cost", ""))
    except ValueError:
        return None


def request_hash(run: ClaimedRun) -> str:
    """Return a hash that is the same for the same request: processor and prompt."""
    text = json.dumps([run.processor, run.metadata.get("promptSpec")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
