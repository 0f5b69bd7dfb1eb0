"""generate: the tasks of runs, from claim to settlement.

Every run is a task of its own. It ends in exactly one settlement, or was taken away (cancelled, requeued, taken over),
and then only records what it may have cost. Every failure is a `RunError` that carries its own policy.
"""

import asyncio
import time
from functools import partial

import structlog

from daemon.queue.client import Acknowledgement
from daemon.queue.outbox import Outbox
from daemon.run import ClaimedRun
from daemon.worker import endings
from daemon.worker.attempt import Attempts
from daemon.worker.outcomes import UNTOUCHED
from daemon.worker.publisher import Publisher
from daemon.worker.reporter import RunReporter
from daemon.worker.retries import Retries

log = structlog.stdlib.get_logger()


class Worker:
    """Works on the runs that were claimed.

    Args:
        group: Owns the runs' tasks.
        outbox: Takes progress and outcomes.
        attempts: Works on one attempt.
        publisher: Stores previews.
        retries: Forgets runs that have ended.
        app_url: The frontend's address, for links to workflows of failed runs; None for none.
    """

    def __init__(
        self,
        group: asyncio.TaskGroup,
        outbox: Outbox,
        *,
        attempts: Attempts,
        publisher: Publisher,
        retries: Retries,
        app_url: str | None = None,
    ) -> None:
        self._group = group
        self._outbox = outbox
        self._attempts = attempts
        self._publisher = publisher
        self._retries = retries
        self._app_url = app_url
        self._tasks: dict[int, tuple[asyncio.Task[None], RunReporter]] = {}
        self._settled: set[int] = set()

    @property
    def idle(self) -> bool:
        """Whether no run is being worked on."""
        return not self._tasks

    def start(self, run: ClaimedRun) -> None:
        """Start the task of a run."""
        reporter = RunReporter(self._outbox, run, partial(self._publisher.preview, run))
        task = self._group.create_task(self._work(run, reporter), name=f"run {run.id}")
        self._tasks[run.claim] = task, reporter
        task.add_done_callback(lambda _: self._ended(run))

    def drop(self, claims: set[int]) -> None:
        """Cancel the tasks of lost claims. Unknown claims are ignored."""
        for claim in claims & self._tasks.keys():
            task, reporter = self._tasks[claim]
            reporter.dropped = True
            task.cancel()

    def hand_back(self, *, storing_too: bool = False) -> None:
        """Cancel the tasks and give the runs back: the daemon must leave.

        A picture that is being stored is paid for: it may still arrive, unless `storing_too`.
        """
        for task, reporter in self._tasks.values():
            if storing_too or not reporter.accounted:
                task.cancel()

    async def _work(self, run: ClaimedRun, reporter: RunReporter) -> None:
        structlog.contextvars.bind_contextvars(run_id=run.id, attempt=run.attempt, processor=run.processor)
        started = time.monotonic()
        try:
            outcome = await self._attempts.work(run, reporter)
        except Exception:  # outside of the attempt's own boundary: this run suffers, and no other
            log.exception("run.crashed")
            outcome = endings.crashed(reporter)
        reporter.close()
        self._settled.add(run.claim)
        acknowledgement = await self._outbox.settle(run, outcome)
        try:
            self._finished(run, acknowledgement, time.monotonic() - started)
        except Exception:  # the run is settled: what is only told of it must end nothing
            log.exception("run.not_logged")

    def _finished(self, run: ClaimedRun, acknowledgement: Acknowledgement, seconds: float) -> None:
        """Forget and log a run that is settled, by what the database has made of it."""
        fate = acknowledgement.fate
        if fate is None or fate.outcome != "retried":
            self._retries.forget(run)
        if fate is None:  # it was taken away meanwhile, or cannot be written
            log.info("run.finished", result=acknowledgement.result, seconds=round(seconds, 3))
            return
        line = {
            "outcome": fate.outcome,
            "result": acknowledgement.result,
            "code": fate.code,
            "seconds": round(seconds, 3),
        }
        if fate.outcome != "failed":
            log.info("run.finished", **line)
            return
        link = {"link": f"{self._app_url}#{run.workflow_id}"} if self._app_url else {}
        log.warning("run.finished", error=fate.error, workflow=run.workflow_id, node=run.node_id, **line, **link)

    def _ended(self, run: ClaimedRun) -> None:
        """Release the run of a task that settled nothing: cancelled before its first step, or as its outcome was chosen. Its slot
        would be lost. What it had sent by then may be charged."""
        _, reporter = self._tasks.pop(run.claim)
        if run.claim not in self._settled:
            self._outbox.post(run, endings.stopped(reporter) if reporter.requested else UNTOUCHED)
        self._settled.discard(run.claim)
