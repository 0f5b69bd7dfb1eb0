"""The ways a run can leave this daemon, and their JSON for `image_jobs.settle_runs`.

No other file spells a key of a settlement: its contract stands here and in `sql/README.md`. `endings.py`
chooses an outcome by what happened, `publisher.py` where there is a picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, TypeAlias

from daemon.calls import Call, seconds_since
from daemon.errors import RunError
from daemon.events import Event


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run has no image: `runs.payload` of a run that failed, or is tried again."""

    error: str
    code: str
    hint: str
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    image_url: str | None = None
    """Of a picture that is stored all the same."""
    image_path: str | None = None

    @classmethod
    def of(cls, error: RunError) -> Self:
        """Return the failure that an error describes."""
        return cls(error.message, error.code, error.hint, error.data)

    def hint_with(self, fate: str) -> str:
        """Return the hint, with what becomes of the run."""
        return f"{self.hint} {fate}".strip()

    def to_json(self) -> dict[str, Any]:
        """Return the failure as `runs.payload` has it."""
        payload: dict[str, Any] = {"error": self.error, "code": self.code, "hint": self.hint}
        if self.details:
            payload["details"] = dict(self.details)
        if self.image_url is not None:
            payload |= {"imageUrl": self.image_url, "imagePath": self.image_path}
        return payload


AGAIN = "It is tried again by itself."
OVER = "It has been tried as often as it may be; a retry tries again."
"""The end of the hint of a failure that another attempt may mend: while there is one, and once there is none."""

UNWRITABLE = Failure(
    "The result could not be written to the database.",
    "internal",
    "The daemon's log says why. If there is an imageUrl beside this, the image is stored and can be used.",
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A stored picture: of `runs.payload` the part about the picture itself. `cost` is USD; None where unknown."""

    original_url: str | None
    revised_prompt: str | None
    width: int | None
    height: int | None
    content_type: str | None
    bytes: int
    cost: float | None
    seed: int | None = None
    quality: str | None = None
    """Of the request, as they were used; None where not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ending:
    """The part that all outcomes have in common.

    `events` are written before the outcome's own event; `if_lost` is written instead of them, if the claim is gone.
    `http_status` is the provider's, by which all daemons know whether it is up; None where no answer came.
    `calls` is what became of calls, also then; None leaves it to `image_jobs.calls_of`, which goes by the outcome.
    """

    name: ClassVar[str]
    events: Sequence[Event] = ()
    if_lost: Event | None = None
    http_status: int | None = None
    calls: Sequence[Call] | None = None

    def following(self, earlier: Sequence[Event]) -> Self:
        """Return the outcome with `earlier` events in front of its own."""
        return replace(self, events=(*earlier, *self.events))

    def noted(self) -> Self:
        """Return the outcome without the provider's response, which the database has noted: a response counts once."""
        return replace(self, http_status=None)

    def unwritable(self, reason: str) -> "Failed":
        """Return the outcome to write instead, if the database refuses this one for a `reason`."""
        return Failed(replace(UNWRITABLE, details={"reason": reason}), calls=self.calls)

    def _to_json(self, **fields: Any) -> dict[str, Any]:
        """Return the settlement with the given fields; those that are None are left out."""
        if_lost = None if self.if_lost is None else self.if_lost.to_json()
        events = [event.to_json() for event in self.events]
        calls = None if self.calls is None else [call.to_json() for call in self.calls]
        known = {"outcome": self.name, **fields, "events": events, "if_lost": if_lost, "calls": calls}
        known["http_status"] = self.http_status
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Completed(_Ending):
    """The picture is stored. `requested_model` is what the caller asked for; `images` are URLs of further pictures, `image_paths` their
    paths, in the same sequence.

    Paths are the keys in the bucket, which a client signs where the bucket is private.
    `stored_at` is when storage had it, by the monotonic clock. The run's times are the database's.
    """

    name: ClassVar[str] = "completed"

    picture: Picture
    image_url: str
    image_path: str
    thumbnail_url: str | None
    thumbnail_path: str | None
    provider: str
    model: str
    requested_model: str
    stored_at: float
    images: Sequence[str] = ()
    image_paths: Sequence[str] = ()

    def unwritable(self, reason: str) -> "Failed":
        """Return the outcome to write instead, which keeps the URL of the stored picture."""
        failure = replace(UNWRITABLE, details={"reason": reason}, image_url=self.image_url, image_path=self.image_path)
        return Failed(failure, calls=self.calls)

    def to_json(self) -> dict[str, Any]:
        """Return the settlement as `image_jobs.settle_runs` takes it."""
        payload: dict[str, Any] = {
            "imageUrl": self.image_url,
            "imagePath": self.image_path,
            "thumbnailUrl": self.thumbnail_url,
            "thumbnailPath": self.thumbnail_path,
            "originalUrl": self.picture.original_url,
            "revisedPrompt": self.picture.revised_prompt,
            "width": self.picture.width,
            "height": self.picture.height,
            "contentType": self.picture.content_type,
            "bytes": self.picture.bytes,
            "provider": self.provider,
            "model": self.model,
            "requestedModel": self.requested_model,
            "cost": self.picture.cost,
        }
        known = {"seed": self.picture.seed, "quality": self.picture.quality}
        payload |= {name: value for name, value in known.items() if value is not None}
        if self.images:
            payload |= {"images": list(self.images), "imagePaths": list(self.image_paths)}
        return self._to_json(payload=payload, stored_ago=seconds_since(self.stored_at))


@dataclass(frozen=True, slots=True)
class Failed(_Ending):
    """There is no picture, and this provider will make none. `fall_back`: another may do better."""

    name: ClassVar[str] = "failed"

    failure: Failure
    fall_back: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the settlement as `image_jobs.settle_runs` takes it."""
        return self._to_json(payload=self.failure.to_json(), fall_back=self.fall_back or None)


@dataclass(frozen=True, slots=True)
class Retry(_Ending):
    """The run is tried again in `due_in` seconds.

    `refund` gives the attempt back, as nothing can have been paid: for `refund_for` seconds since the first refusal in a row,
    an hour if that is None.
    """

    name: ClassVar[str] = "retry"

    failure: Failure
    due_in: float
    message: str
    refund: bool = False
    fall_back: bool = False
    refund_for: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the settlement as `image_jobs.settle_runs` takes it, which decides whether the attempts are used up."""
        return self._to_json(
            payload={**self.failure.to_json(), "hint": self.failure.hint_with(AGAIN)},
            over_hint=self.failure.hint_with(OVER),
            due_in=self.due_in,
            message=self.message,
            refund=self.refund or None,
            refund_for=self.refund_for,
            fall_back=self.fall_back or None,
        )


@dataclass(frozen=True, slots=True)
class Parked(_Ending):
    """The provider is at work on a job: the run is checked in `due_in` seconds, or when a webhook comes (`webhook`).

    With `ticket` and `processor`, the job of a claim that is gone finds its run, or is cancelled. `found`: an earlier attempt
    has submitted it.
    """

    name: ClassVar[str] = "parked"

    provider_job_id: str
    due_in: float
    message: str
    webhook: bool = False
    progress: int | None = None
    ticket: int | None = None
    processor: str | None = None
    found: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the settlement as `image_jobs.settle_runs` takes it."""
        return self._to_json(
            provider_job_id=self.provider_job_id,
            due_in=self.due_in,
            message=self.message,
            webhook=self.webhook,
            progress=self.progress,
            ticket=self.ticket,
            processor=self.processor,
            found=self.found or None,
        )


@dataclass(frozen=True, slots=True)
class Released(_Ending):
    """The run is given back as it was, for any daemon to claim; `message` is for the person at the canvas."""

    name: ClassVar[str] = "released"

    message: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the settlement as `image_jobs.settle_runs` takes it."""
        return self._to_json(message=self.message)


Outcome: TypeAlias = Completed | Failed | Retry | Parked | Released

UNTOUCHED = Released("Handed back before work began.")
