"""Asking about an order that a provider has taken, and when it is asked again."""

import asyncio
from typing import Any

from daemon import outcomes
from daemon.errors import Refused, Retryable, RunError
from daemon.heartbeat import Heartbeat
from daemon.policy import Policy
from daemon.providers import Deferred, Generated, Provider, Request, Waiting
from daemon.queue import Claimed
from daemon.reporter import RunReporter


class _NoAnswer(Waiting):
    """The question about an order came to nothing, which says nothing about the order."""


class Checks:
    """Asks about the orders of runs, each with the id that was written down for it.

    Args:
        heartbeat: Nothing is asked without a fresh lease.
        policy: How long an answer, a webhook and the picture itself may take.
    """

    def __init__(self, heartbeat: Heartbeat, policy: Policy) -> None:
        self._heartbeat = heartbeat
        self._policy = policy

    async def ask(
        self, run: Claimed, provider: Provider, job_id: str, request: Request, reporter: RunReporter
    ) -> Generated | Waiting:
        """Asks a provider about an order. Trouble with asking is no answer: it is asked again later.

        Raises:
            RunError: If the order came to nothing, or has been asked about for long enough.
        """
        if not isinstance(provider, Deferred):
            raise Refused(
                "The provider cannot be asked about this order any more.",
                code="invalid_request",
                hint="Requeue the run to make the image anew.",
            )
        await self._heartbeat.wait_fresh()
        if run.webhook == "awaited":
            seconds = round(self._policy.webhook_wait.total_seconds())
            reporter.incident(f"No webhook came within {seconds} s; it is polled from now on.", providerJobId=job_id)
        try:
            async with asyncio.timeout(self._policy.run_timeout.total_seconds()):
                made = await provider.check(job_id, request, reporter)
        except TimeoutError:
            made = _NoAnswer(message="The provider takes its time to answer.")
        except Retryable as error:
            if error.accepted:
                raise
            made = _NoAnswer(message=error.message)
        if isinstance(made, Waiting):
            self._end_if_over(run, job_id, trouble=made.message if isinstance(made, _NoAnswer) else None)
        return made

    async def park(self, run: Claimed, waiting: Waiting, reporter: RunReporter) -> dict[str, Any]:
        """Answers the body of the settlement with which a run waits for its next question."""
        await reporter.shown()
        webhook = run.webhook == "came" and not isinstance(waiting, _NoAnswer)
        due = self._policy.next_check(run, webhook=webhook)
        return outcomes.still_waiting(run.provider_job_id, waiting, due=due, webhook=webhook)

    def put_off(self, run: Claimed, job_id: str, reason: RunError) -> dict[str, Any]:
        """The same where it could not be asked at all, for a reason of ours.

        Raises:
            Refused: If the order has been asked about for long enough.
        """
        self._end_if_over(run, job_id, trouble=reason.message)
        waiting = Waiting(message=reason.message)
        return outcomes.still_waiting(job_id, waiting, due=self._policy.poll_interval, webhook=False)

    def _end_if_over(self, run: Claimed, job_id: str, *, trouble: str | None) -> None:
        """Raises the end of an order that has been asked about for long enough; `trouble` is what the last question met."""
        if run.submitted_ago is None or run.submitted_ago <= self._policy.poll_timeout:
            return
        raise Refused(
            "Polling timeout exceeded",
            code="polling_timeout",
            hint=f"{trouble or 'The provider may still deliver.'} Requeue the run to ask for the same image again.",
            data={"incident": True, "seconds": round(run.submitted_ago.total_seconds()), "providerJobId": job_id},
        )
