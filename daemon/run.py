"""The values that every room passes on: a run that was claimed, and a job that a provider holds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Self
from uuid import UUID

Webhook = Literal["awaited", "came"]
"""Of a provider job: a webhook is awaited until its next check, or it came and made the check due."""

LONGEST_NODE_ID = 200
"""Characters of it in a line of the log."""


@dataclass(frozen=True, slots=True)
class ClaimedRun:
    """A run that this daemon holds. `claim` is the fencing token: every write-back names it."""

    daemon: UUID
    id: str
    claim: int
    ticket: int
    workflow_id: str
    processor: str
    """`provider:model` at work. After a step of `metadata.fallback`, `requested` still has the one that was asked for."""
    requested: str
    call: int
    """The call that this claim is about: its own, or of a provider job that of the claim which made it."""
    metadata: Mapping[str, Any]
    attempt: int
    max_attempts: int
    provider_job_id: str | None
    webhook: Webhook | None
    submitted_ago: timedelta | None
    waited: timedelta
    """From due to claimed."""
    created_by: str | None = None
    """The user who may see what it reads in storage; None if an operator inserted it for nobody."""
    source_workflow: str | None = None
    """The workflow of the image to refine that was checked at insert."""
    generated: Mapping[str, Any] | None = None
    """The data of the event `generated` of an earlier attempt (see `RunReporter.generated`)."""
    contested: bool = False
    """Whether a claim that was taken away may still be storing its picture, before a requeue or since."""

    @property
    def job_lost(self) -> bool:
        """Whether it is claimed to check a provider job whose id has been removed: no call is opened for such a claim."""
        return self.provider_job_id is None and self.call != self.claim

    @property
    def node_id(self) -> str | None:
        """The node that it is for, as far as the caller names one."""
        node = self.metadata.get("nodeId")
        return node[:LONGEST_NODE_ID] if isinstance(node, str) else None

    @classmethod
    def read(cls, daemon: UUID, run: Mapping[str, Any]) -> Self:
        """Read the JSON that `image_jobs.claimed_run` wrote."""
        submitted = run["submitted_ago"]
        return cls(
            daemon=daemon,
            id=run["id"],
            claim=run["claim"],
            ticket=run["ticket"],
            workflow_id=run["subject_id"],
            processor=run["processor"] or "",  # adopted rows may have none
            requested=run["requested"],
            call=run["call"],
            metadata=run["metadata"],
            attempt=run["attempt"],
            max_attempts=run["max_attempts"],
            provider_job_id=run["provider_job_id"],
            webhook=run["webhook"],
            submitted_ago=None if submitted is None else timedelta(seconds=submitted),
            waited=timedelta(seconds=run["waited"]),
            created_by=run["created_by"],
            source_workflow=run["source_workflow"],
            generated=run["generated"],
            contested=run["contested"],
        )


@dataclass(frozen=True, slots=True)
class Fate:
    """The fate of a run that was settled: the daemon asks, the database decides."""

    outcome: Literal["completed", "failed", "cancelled", "retried", "parked", "released", "fallback"]
    code: str | None = None
    """Of a run that failed or is tried again."""
    error: str | None = None
    timings: Mapping[str, int] | None = None
    """In milliseconds: `queuedMs`, `generateMs`, `storeMs`, `settleMs`; of a run that failed as far as it got."""


@dataclass(frozen=True, slots=True)
class ProviderJob:
    """A job that a provider holds, by the id the provider gave it, and its run where that is known."""

    provider: str
    id: str
    run_id: str | None

    @classmethod
    def read(cls, text: str) -> Self:
        """Read the JSON that `image_jobs.unmatched_deliveries` and `image_jobs.take_cancellations` write."""
        job = json.loads(text)
        return cls(job["provider"], job["provider_job_id"], job.get("run_id"))
