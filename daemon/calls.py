"""The account of a request to a provider: an entry of `image_jobs.calls`, as a daemon writes it."""

import time
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["open", "charged", "unknown", "free"]


def seconds_since(instant: float | None) -> float | None:
    """Return the seconds since an instant of the monotonic clock, as it is written: the database makes it an instant of its
    own clock, however long the writing had to wait."""
    return None if instant is None else round(time.monotonic() - instant, 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Facts about a call. Exact ones replace unknown ones, in any sequence and however often they are written.

    `id` is the claim under which the request left. `state` None leaves that as it is. `cost` and `estimate` are USD; None
    where not known. `model` is the one that draws. `image`: an image came. `sent_at` and `image_at` are when the request went out
    and the image was here, by this process's monotonic clock; None where not known.
    """

    id: int
    state: State | None = None
    cost: float | None = None
    estimate: float | None = None
    model: str | None = None
    provider_job_id: str | None = None
    sent_at: float | None = None
    image: bool = False
    image_at: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the call as `image_jobs.close_calls` takes it; what is not known is left out."""
        fields: dict[str, Any] = {
            "id": self.id,
            "state": self.state,
            "cost": self.cost,
            "estimate": self.estimate,
            "model": self.model,
            "provider_job_id": self.provider_job_id,
            "sent_ago": seconds_since(self.sent_at),
            "image": self.image or None,
            "image_ago": seconds_since(self.image_at),
        }
        return {name: value for name, value in fields.items() if value is not None}
