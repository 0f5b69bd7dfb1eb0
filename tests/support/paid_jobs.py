"""Jobs of a paid API: its background mode, whose requests say nothing of cost until a job has ended or is cancelled."""

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

MAINLINE = "gpt-6-luna"
LONGEST = 4
"""Checks until a job has drawn, at most."""
TROUBLE = 0.15
"""Of the checks are answered with an error, which says nothing about the job."""
ENDED = ("completed", "cancelled")


@dataclass
class Job:
    """A job. It draws after so many checks; one that nobody asks about has drawn, and is charged."""

    number: int
    metadata: Any
    left: int
    status: str = "in_progress"


@dataclass
class PaidJobs:
    """The jobs that were accepted."""

    random: Random
    jobs: list[Job] = field(default_factory=list)

    def submit(self, number: int, metadata: Any) -> Job:
        """Accept a job for the n-th request."""
        job = Job(number, metadata, self.random.randint(1, LONGEST))
        self.jobs.append(job)
        return job

    def find(self, path: str) -> Job | None:
        """Find the job of a path."""
        return next((job for job in self.jobs if f"/resp_{job.number:040d}" in path), None)

    def check(self, job: Job, *, calm: bool) -> tuple[int, bytes] | None:
        """Advance a job; return an answer that says nothing about it, or None where it is to be shown."""
        if not calm and self.random.random() < TROUBLE:
            error = {"error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": None}}
            return self.random.choice(
                [(400, json.dumps(error).encode()), (404, b"<html>No route</html>"), (502, b"<html>Oh</html>")]
            )
        if job.status not in ENDED:
            job.left = 0 if calm else job.left - 1
            job.status = "completed" if job.left <= 0 else "in_progress"
        return None

    def cancel(self, job: Job) -> bool:
        """Cancel a job; return whether it had not ended."""
        if job.status in ENDED:
            return False
        job.status = "cancelled"
        return True


def shown(job: Job, picture: str, usage: dict[str, Any]) -> dict[str, Any]:
    """Return a job as a response of the API."""
    document: dict[str, Any] = {
        "id": f"resp_{job.number:040d}",
        "object": "response",
        "status": job.status,
        "model": MAINLINE,
        "metadata": job.metadata,
        "service_tier": "default",
        "error": None,
        "output": [],
    }
    if job.status == "completed":
        call = {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": picture}
        none = {"input_tokens": 0, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 0}
        document |= {"output": [call], "usage": none, "tool_usage": {"image_gen": usage}}
    return document
