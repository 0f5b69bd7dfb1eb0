"""The account of a request to a provider: an entry of `image_jobs.calls`, as a daemon writes it."""

from dataclasses import dataclass
from typing import Any, Literal

State = Literal["open", "charged", "unknown", "free"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Facts about a call. Exact ones replace unknown ones, in any sequence and however often they are written.

    `id` is the claim under which the request left. `state` None leaves that as it is. `cost` and `estimate` are USD; None
    where not known. `model` is the one that draws. `sent`: the request is going out. `image`: an image came.
    """

    id: int
    state: State | None = None
    cost: float | None = None
    estimate: float | None = None
    model: str | None = None
    provider_job_id: str | None = None
    sent: bool = False
    image: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the call as `image_jobs.close_calls` takes it; what is not known is left out."""
        fields: dict[str, Any] = {
            "id": self.id,
            "state": self.state,
            "cost": self.cost,
            "estimate": self.estimate,
            "model": self.model,
            "provider_job_id": self.provider_job_id,
            "sent": self.sent or None,
            "image": self.image or None,
        }
        return {name: value for name, value in fields.items() if value is not None}
