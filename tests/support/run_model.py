"""A model of runs and daemons in Python, as the contract describes them, and what a daemon may say of a run."""

from dataclasses import dataclass, field
from uuid import UUID, uuid4

WORKFLOWS = (UUID(int=1), UUID(int=2))
NODES = ("left", "right")
DAEMONS = 2
TERMINAL = ("completed", "failed", "cancelled")
LEASE = 30
HOUR = 3600
# Not a divisor of anything that the database waits for, so that a step never ends where a wait does.
STRIDE = 1007

ASKED = "demo:painter"
FALLBACK = ("demo:second", "demo:third")

AGAIN = {"outcome": "retry", "payload": {"error": "Again.", "code": "unavailable"}}
OUTCOMES: tuple[dict[str, object], ...] = (
    {"outcome": "completed", "payload": {"imageUrl": "https://example.com/x.png"}},
    {"outcome": "failed", "payload": {"error": "It failed.", "code": "refused"}},
    {"outcome": "failed", "payload": {"error": "It is gone.", "code": "model_retired"}, "fall_back": True},
    {"outcome": "failed", "payload": {"error": "It took too long.", "code": "polling_timeout"}},
    AGAIN | {"due_in": 0},
    AGAIN | {"due_in": 500},
    AGAIN | {"due_in": 0, "refund": True},
    AGAIN | {"due_in": 500, "refund": True, "fall_back": True},
    AGAIN | {"due_in": 0, "refund": True, "refund_for": 300},
    {"outcome": "parked", "due_in": 0},
    {"outcome": "parked", "due_in": 500},
    {"outcome": "released"},
)


@dataclass
class Run:
    """The model of a run. `state` says held or parked where the database says running."""

    workflow: UUID
    node: str | None
    claim: int
    ticket: int
    state: str = "pending"
    holder: UUID | None = None
    attempt: int = 0
    max_attempts: int = 3
    job: str | None = None
    code: str | None = None
    refused_since: float | None = None
    unheld: bool = False
    call: int = 0
    steps: tuple[str, ...] = ()
    step: int = 0

    @property
    def routed_to(self) -> str | None:
        """Return the step that it was rerouted to."""
        return self.steps[self.step - 1] if self.step else None

    @property
    def status(self) -> str:
        return "running" if self.state in ("held", "parked") else self.state

    def again(self, claim: int, ticket: int) -> None:
        """Requeue, as an outside writer does by setting it to pending."""
        if self.state != "failed" or self.code != "polling_timeout":
            self.job = None
        if self.job is None:
            self.step = 0
        self.state, self.claim, self.ticket = "pending", claim, ticket
        self.holder, self.attempt, self.code, self.refused_since, self.unheld = None, 0, None, None, False


@dataclass
class Daemon:
    """A daemon, and the runs it believes to hold: {claim: run}."""

    id: UUID = field(default_factory=uuid4)
    held: dict[int, str] = field(default_factory=dict)
