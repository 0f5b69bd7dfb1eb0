"""Checks provider jobs: how, for how long, and when again."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta

from daemon.errors import Refused, Retryable, RunError
from daemon.providers import Deferred, Generated, Provider, Request, Submitted, Waiting
from daemon.queue.lease import Lease
from daemon.run import ClaimedRun
from daemon.worker import endings
from daemon.worker.outcomes import Parked
from daemon.worker.reporter import RunReporter


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits of runs; see the settings of the same names. A webhook is waited for at most until a run is given up
    (`poll_timeout`). `webhooks` are the providers whose webhooks are verified."""

    run_timeout: timedelta
    poll_interval: timedelta
    poll_timeout: timedelta
    webhook_wait: timedelta
    webhooks: frozenset[str]
    strict_models: bool

    def first_check(self, job: Submitted) -> timedelta:
        """Return the time from submit to the first check, if no webhook comes before."""
        if job.webhook:
            return self.webhook_wait
        return min(job.check_in or self.poll_interval, self.poll_timeout)

    def next_check(self, run: ClaimedRun, *, webhook: bool) -> timedelta:
        """Return the time from one check to the next. With `webhook` one will come: no check is due before."""
        if not webhook:
            return self.poll_interval
        left = self.poll_timeout - (run.submitted_ago or timedelta(0))
        return max(min(self.webhook_wait, left), timedelta(0))


class _Unreachable(Waiting):
    """A check that failed, which says nothing about the provider job."""


class Polling:
    """Checks the provider jobs of parked runs, each by the id that was written down for it.

    Args:
        lease: No check begins without a fresh one.
        policy: How long a check, a webhook and the picture itself may take.
    """

    def __init__(self, lease: Lease, policy: Policy) -> None:
        self._lease = lease
        self._policy = policy

    async def check(
        self, run: ClaimedRun, provider: Provider, job_id: str, request: Request, reporter: RunReporter
    ) -> Generated | Waiting:
        """Check a provider job once. Trouble on the way counts as waiting: it is checked again later.

        Raises:
            RunError: If the job failed, or has been checked for long enough.
        """
        if not isinstance(provider, Deferred):
            raise Refused(
                "The provider cannot be asked about this order any more.",
                code="invalid_request",
                hint="Requeue the run to make the image anew.",
            )
        await self._lease.wait_fresh()
        if run.webhook == "awaited":
            seconds = round(self._policy.webhook_wait.total_seconds())
            reporter.incident(
                f"No webhook came within {seconds} s; it is polled from now on.", webhook="late", providerJobId=job_id
            )
        reporter.asked = True
        try:
            async with asyncio.timeout(self._policy.run_timeout.total_seconds()):
                made = await provider.check(job_id, request, reporter)
        except TimeoutError:
            made = _Unreachable(message="The provider takes its time to answer.")
        except Retryable as error:
            if error.accepted:
                raise
            made = _Unreachable(message=error.message)
        if isinstance(made, Waiting):
            self._end_if_over(run, job_id, trouble=made.message if isinstance(made, _Unreachable) else None)
        return made

    async def park(self, run: ClaimedRun, job_id: str, waiting: Waiting, reporter: RunReporter) -> Parked:
        """Return the outcome with which a run waits for its next check."""
        await reporter.shown()
        webhook = run.webhook == "came" and not isinstance(waiting, _Unreachable)
        due = self._policy.next_check(run, webhook=webhook)
        return endings.still_waiting(job_id, waiting, due=due, webhook=webhook)

    def put_off(self, run: ClaimedRun, job_id: str, reason: RunError) -> Parked:
        """Return the outcome of a check that could not begin, for a reason of ours.

        Raises:
            Refused: If the provider job has been checked for long enough.
        """
        self._end_if_over(run, job_id, trouble=reason.message)
        waiting = Waiting(message=reason.message)
        return endings.still_waiting(job_id, waiting, due=self._policy.poll_interval, webhook=False)

    def _end_if_over(self, run: ClaimedRun, job_id: str, *, trouble: str | None) -> None:
        """Raise if the provider job has been checked for long enough; `trouble` is the message of the last check's failure."""
        if run.submitted_ago is None or run.submitted_ago <= self._policy.poll_timeout:
            return
        raise Refused(
            "Polling timeout exceeded",
            code="polling_timeout",
            hint=f"{trouble or 'The provider may still deliver.'} Requeue the run to ask for the same image again.",
            data={"incident": True, "seconds": round(run.submitted_ago.total_seconds()), "providerJobId": job_id},
        )
