"""An entry of a run's audit trail, as `run_events` keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID, uuid4

Kind = Literal["progress", "log", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the audit trail: `name` for programs, `message` for people, `data` for both.

    The id is for the write whose acknowledgement is lost: sent again, the event (and its cost) still counts once.
    """

    name: str
    message: str
    kind: Kind = "log"
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    id: UUID = field(default_factory=uuid4)

    def to_json(self) -> dict[str, Any]:
        """Return the event as `image_jobs.add_events` takes it; empty data is left out."""
        payload: dict[str, Any] = {"event": self.name, "message": self.message}
        if self.data:
            payload["data"] = dict(self.data)
        return {"id": str(self.id), "kind": self.kind, "payload": payload}
