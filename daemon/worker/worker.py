"""generate: one run, from claim to settlement.

Every run is a task of its own. It ends in exactly one settlement, or was taken away (cancelled, requeued, taken over),
and then only says what it may have cost. What goes wrong arrives as a `RunError` that carries its own policy.
"""

import asyncio
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog

from daemon import disk, outcomes
from daemon.back_off import BackOff
from daemon.calls import answered
from daemon.checks import Checks
from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError
from daemon.fetch import Fetcher
from daemon.heartbeat import Heartbeat
from daemon.inputs import Inputs
from daemon.metrics import Metrics
from daemon.policy import Policy
from daemon.prompt import PromptSpec
from daemon.providers import Generated, Provider, Request, Submitted, Traceable, Waiting, setting
from daemon.providers.catalogue import Resolved, resolve
from daemon.publisher import Publisher
from daemon.queue import UNAVAILABLE, Claimed, Queue
from daemon.reporter import RunReporter
from daemon.storage import Storage
from daemon.turns import Turns

log = structlog.stdlib.get_logger()

MOST_WARNINGS = 10
"""Of one kind: a prompt may have as many unknown fields as fit into a row."""


class Worker:
    """Works on the runs that were claimed.

    Args:
        group: Owns the runs' tasks.
        queue, turns, heartbeat: The database, the conversation with it, and the lease.
        storage, contexts, fetcher: Where input images come from, and what was said beside them.
        publisher: Stores pictures.
        providers: Those that have a key here, by name.
        policy, metrics: How long things may take, and who counts them.
        tmp_dir: Where pictures lie until they are stored.
        app_url: The frontend's address, for whoever reads of a run that failed; None for none.
    """

    def __init__(
        self,
        group: asyncio.TaskGroup,
        *,
        queue: Queue,
        turns: Turns,
        heartbeat: Heartbeat,
        storage: Storage,
        contexts: Storage,
        fetcher: Fetcher,
        publisher: Publisher,
        providers: Mapping[str, Provider],
        policy: Policy,
        metrics: Metrics,
        tmp_dir: Path | None,
        app_url: str | None = None,
    ) -> None:
        self._group = group
        self._queue = queue
        self._turns = turns
        self._heartbeat = heartbeat
        self._inputs = Inputs(storage, contexts, fetcher, publisher, max_bytes=policy.max_image_bytes)
        self._publisher = publisher
        self._checks = Checks(heartbeat, policy)
        self._providers = providers
        self._policy = policy
        self._metrics = metrics
        self._tmp_dir = tmp_dir
        self._app_url = app_url
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._dropped: set[int] = set()
        self._storing: set[int] = set()
        self._written: set[int] = set()
        self._back_off = BackOff()

    @property
    def idle(self) -> bool:
        """Whether no run is being worked on."""
        return not self._tasks

    def start(self, run: Claimed) -> None:
        """Begins to work on a run."""
        task = self._tasks[run.claim] = self._group.create_task(self._work(run), name=f"run {run.id}")
        task.add_done_callback(lambda _: self._ended(run))

    def drop(self, claims: set[int]) -> None:
        """These claims are no longer ours: stops their work. Unknown ones are none of our business."""
        for claim in claims & self._tasks.keys():
            self._dropped.add(claim)
            self._tasks[claim].cancel()

    def hand_back(self, *, storing_too: bool = False) -> None:
        """Stops work and gives the runs back: the daemon must leave. A picture that is being stored is paid for: it may
        still arrive, unless `storing_too`."""
        for claim, task in self._tasks.items():
            if storing_too or claim not in self._storing:
                task.cancel()

    async def _work(self, run: Claimed) -> None:
        structlog.contextvars.bind_contextvars(run_id=run.id, attempt=run.attempt, processor=run.processor)
        started = time.monotonic()
        reporter = RunReporter(self._turns, run, lambda image: self._publisher.preview(run, image))
        body = await self._outcome(run, reporter)
        reporter.close()
        self._written.add(run.claim)
        result = await self._turns.settle(run, body)
        if body["outcome"] != "retry":
            self._back_off.forget(run)
        payload: dict[str, Any] = body.get("payload") or {}
        link = {"link": f"{self._app_url}#{run.workflow_id}"} if self._app_url and body["outcome"] == "failed" else {}
        self._metrics.finished(run, body["outcome"], time.monotonic() - started)
        log.info(
            "run.finished",
            outcome=body["outcome"],
            result=result,
            code=payload.get("code"),
            seconds=round(time.monotonic() - started, 3),
            **link,
        )

    def _ended(self, run: Claimed) -> None:
        """A task that was cancelled before its first step, or twice, wrote nothing back: without this, its slot is lost."""
        del self._tasks[run.claim]
        self._dropped.discard(run.claim)
        self._storing.discard(run.claim)
        if run.claim not in self._written:
            self._turns.release(run)
        self._written.discard(run.claim)

    async def _outcome(self, run: Claimed, reporter: RunReporter) -> dict[str, Any]:
        """Works on the run and answers the body of its settlement."""
        try:
            # What cannot be cleared away must not cost the outcome.
            with tempfile.TemporaryDirectory(
                prefix="image-jobs-", dir=self._tmp_dir, ignore_cleanup_errors=True
            ) as workdir:
                return await self._attempt(run, reporter, Path(workdir))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            dropped = run.claim in self._dropped
            return outcomes.stopped(reporter, dropped=dropped)
        except RunError as error:
            return await self._failed(run, error, reporter)
        except Exception as error:  # the one boundary: a bug of ours must end this run with a reason, and no other
            if disk.is_disk(error):
                log.warning("disk.unusable", error=str(error))
                return await self._without_disk(run, error, reporter)
            log.exception("run.crashed")
            return outcomes.crashed(reporter)

    async def _failed(self, run: Claimed, error: RunError, reporter: RunReporter) -> dict[str, Any]:
        wait = self._back_off.next(run)
        if isinstance(error, OutcomeUnknown) and reporter.sent and reporter.webhook_wait is not None:
            wait = max(wait, reporter.webhook_wait.total_seconds())
        body = outcomes.failed(error, run, reporter, back_off=wait)
        if isinstance(error, Retryable):
            await self._block(run, error, body["due_in"])
        return body

    async def _without_disk(self, run: Claimed, error: OSError, reporter: RunReporter) -> dict[str, Any]:
        """The disk is in the way: by what had happened until then, it is tried again for nothing, as the next attempt,
        or asked for again."""
        if reporter.sent:
            return await self._failed(run, disk.answer_lost(error), reporter)
        reason = disk.untouched(error)
        if run.provider_job_id is None:
            return await self._failed(run, reason, reporter)
        try:
            return self._checks.put_off(run, run.provider_job_id, reason)
        except Refused as over:
            return await self._failed(run, over, reporter)

    async def _attempt(self, run: Claimed, reporter: RunReporter, workdir: Path) -> dict[str, Any]:
        model, provider = self._choose(run)
        if model.warning:
            reporter.warning(model.warning, field="model", requested=model.requested, effective=model.model)
        reporter.webhook_wait = self._webhook_wait(model.provider, provider)
        prompt = PromptSpec.parse(run.metadata)
        for field in prompt.unknown[:MOST_WARNINGS]:
            reporter.warning(f"promptSpec.{field[:100]} is unknown and was ignored.", field=field[:100])
        if (more := len(prompt.unknown) - MOST_WARNINGS) > 0:
            reporter.warning(f"{more} more fields of promptSpec are unknown and were ignored.", field="promptSpec")
        request = Request(run.id, model.model, prompt, workdir, run.attempt, metadata=run.metadata, ticket=run.ticket)

        started = time.monotonic()
        if run.provider_job_id is not None:
            made = await self._checks.ask(run, provider, run.provider_job_id, request, reporter)
        else:
            if run.attempt > 1 and (adopted := await self._publisher.adopt(run, model)) is not None:
                return adopted
            previous = await self._inputs.previous_image(prompt, workdir)
            context = await self._inputs.previous_context(run, prompt, provider, workdir, reporter)
            request = replace(request, previous_image=previous, previous_context=context)
            made = await self._generate(provider, request, reporter)
        match made:
            case Generated():
                reporter.close()
                generate_ms = round(1000 * (time.monotonic() - started))
                if not await reporter.generated(made):
                    return outcomes.came_late(run, made.cost)
                self._storing.add(run.claim)
                return await self._publisher.publish(run, model, made, workdir, generate_ms=generate_ms)
            case Submitted():
                return outcomes.parked(made, run, due=self._policy.first_check(made))
            case Waiting():
                return await self._checks.park(run, made, reporter)

    def _webhook_wait(self, name: str, provider: Provider) -> timedelta | None:
        """How long a webhook may tell of an order that nothing was heard of; None where none will."""
        told = name in self._policy.webhooks and isinstance(provider, Traceable)
        return self._policy.webhook_wait if told else None

    def _choose(self, run: Claimed) -> tuple[Resolved, Provider]:
        provider = self._providers.get(run.processor.partition(":")[0])
        model = resolve(
            run.processor,
            strict=self._policy.strict_models,
            catalogued=provider is None or bool(provider.models),
        )
        if provider is None:
            raise Refused(
                f"No daemon here can use {model.provider}: {setting(model.provider)} is not set.",
                code="no_key",
                hint="Set it where the daemon runs, restart that, and requeue the run.",
            )
        return model, provider

    async def _generate(self, provider: Provider, request: Request, reporter: RunReporter) -> Generated | Submitted:
        await self._heartbeat.wait_fresh()
        try:
            made = await answered(
                provider.generate(request, reporter),
                timeout=self._policy.run_timeout,
                ordered=lambda: reporter.ordered,
            )
        except TimeoutError:
            seconds = round(self._policy.run_timeout.total_seconds())
            message = f"The provider did not answer within {seconds} s."
            hint = "Try again later, or choose a faster model or a lower quality."
            if reporter.sent:
                raise OutcomeUnknown(message, code="timeout", hint=hint) from None
            raise Retryable(message, code="timeout", hint=hint) from None
        if isinstance(made, Generated) and request.metadata.get("webhookUrl"):
            reporter.warning("webhookUrl has no use here: the image came with the answer.", field="webhookUrl")
        return made

    async def _block(self, run: Claimed, error: Retryable, wait: float) -> None:
        """Closes the provider or the model for every daemon, where the error says so."""
        if error.blocks is None:
            return
        provider, _, model = run.processor.partition(":")
        try:
            await self._queue.block(
                provider, model if error.blocks == "model" else None, timedelta(seconds=wait), error.message
            )
        except UNAVAILABLE as reason:
            log.warning("provider.not_blocked", provider=provider, error=type(reason).__name__)
