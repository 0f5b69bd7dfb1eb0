"""The steps of one attempt: choose the model, fetch the inputs, generate or check, store."""

from asyncio import CancelledError, current_task
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import structlog

from daemon.errors import (
    ASK_OPERATOR,
    OutcomeUnknown,
    Refused,
    Retryable,
    RunError,
    Undecodable,
    is_disk_error,
    nothing_sent,
    response_lost,
)
from daemon.prompt import PromptSpec
from daemon.providers import Generated, Provider, Request, Submitted, Traceable, Waiting, permit, setting
from daemon.providers.catalogue import Resolved, resolve
from daemon.queue.client import Queue
from daemon.queue.lease import Lease
from daemon.queue.outage import describe
from daemon.queue.unreachable import Unreachable
from daemon.run import ClaimedRun
from daemon.worker import endings
from daemon.worker.calls import finish_call
from daemon.worker.inputs import Inputs
from daemon.worker.intake import Intake
from daemon.worker.outcomes import Failed, Outcome, Parked, Retry
from daemon.worker.polling import Policy, Polling
from daemon.worker.publisher import Publisher
from daemon.worker.reporter import RunReporter
from daemon.worker.retries import Retries
from daemon.worker.workdirs import Workdirs

log = structlog.stdlib.get_logger()

OK = 200
"""The status of a call that brought a picture or a job, whatever the protocol."""
UNREACHABLE = "unreachable"
"""The code of `ErrorMessages.transport_error` where nothing was sent."""
MOST_WARNINGS = 10
"""Of one kind: a prompt may have as many unknown fields as fit into a row."""


class Attempts:
    """Works on one attempt of a run at a time, for as many runs as call it.

    Args:
        queue: Blocks providers.
        lease: Nothing is submitted without a fresh one.
        inputs, polling, publisher: The steps that are files of their own.
        intake: Nothing is submitted whose picture could not be kept.
        retries: Counts failed tries.
        unreachable: Counts failed connections.
        providers: Those that have a key here, by name.
        broken: Those whose code cannot be loaded.
        policy: How long things may take.
        workdirs: Where pictures lie until they are stored.
    """

    def __init__(
        self,
        queue: Queue,
        lease: Lease,
        *,
        inputs: Inputs,
        polling: Polling,
        publisher: Publisher,
        intake: Intake,
        retries: Retries,
        unreachable: Unreachable,
        providers: Mapping[str, Provider],
        broken: frozenset[str] = frozenset(),
        policy: Policy,
        workdirs: Workdirs,
    ) -> None:
        self._queue = queue
        self._lease = lease
        self._inputs = inputs
        self._polling = polling
        self._publisher = publisher
        self._intake = intake
        self._retries = retries
        self._unreachable = unreachable
        self._providers = providers
        self._broken = broken
        self._policy = policy
        self._workdirs = workdirs

    async def work(self, run: ClaimedRun, reporter: RunReporter) -> Outcome:
        """Work on a run and return its outcome, also if the task is cancelled meanwhile."""
        outcome = await self._work(run, reporter)
        if reporter.http_status is not None:
            self._unreachable.reached(run.processor.partition(":")[0])
        return replace(outcome, http_status=reporter.http_status)

    async def _work(self, run: ClaimedRun, reporter: RunReporter) -> Outcome:
        try:
            reporter.lease = self._lease
            with self._workdirs.new() as workdir:
                try:
                    return await self._attempt(run, reporter, Path(workdir))
                except Undecodable as error:
                    await self._publisher.keep(run, error)
                    raise
        except CancelledError:
            task = current_task()
            if task is not None:
                task.uncancel()
            return endings.stopped(reporter)
        except RunError as error:
            return await self._failed(run, error, reporter)
        except Exception as error:  # the one boundary: a bug of ours must end this run with a reason, and no other
            if is_disk_error(error):
                log.warning("disk.unusable", error=str(error))
                self._intake.disk_failed(error)
                return await self._without_disk(run, error, reporter)
            log.exception("run.crashed")
            return await self._crashed(run, reporter)

    async def _attempt(self, run: ClaimedRun, reporter: RunReporter, workdir: Path) -> Outcome:
        if run.job_lost:
            raise Refused(
                "The provider's id of this order was removed from the run, so the order cannot be asked for any more.",
                code="invalid_request",
                hint="Requeue the run to make the image anew.",
            )
        model, provider = self._choose(run)
        if run.provider_job_id is None:
            reporter.model = model.model
        if model.warning:
            reporter.warning(model.warning, field="model", requested=model.requested, effective=model.model)
        reporter.webhook_wait = self._webhook_wait(model.provider, provider)
        prompt = _prompt(run, reporter)
        request = Request(run.id, model.model, prompt, workdir, run.attempt, metadata=run.metadata, ticket=run.ticket)

        if run.provider_job_id is not None:
            made = await self._polling.check(run, provider, run.provider_job_id, request, reporter)
            if isinstance(made, Waiting):
                return await self._polling.park(run, run.provider_job_id, made, reporter)
            reporter.http_status = OK
        else:
            if run.attempt > 1 and (adopted := await self._publisher.adopt(run, model)) is not None:
                return adopted
            previous = await self._inputs.previous_image(run, prompt, workdir)
            conversation = await self._inputs.previous_conversation(run, prompt, provider, workdir, reporter)
            request = replace(request, previous_image=previous, previous_conversation=conversation)
            made = await self._generate(provider, request, reporter)
            reporter.http_status = OK
            if isinstance(made, Submitted):
                return endings.submitted(made, run, reporter, due=self._policy.first_check(made))
        reporter.close()
        held = await reporter.generated(made)
        paid = reporter.call("charged", cost=made.cost, image=True)
        if not held:
            return endings.came_late(paid, reporter)
        outcome = await self._publisher.publish(run, model, made, workdir)
        return replace(outcome, calls=[paid])

    def _choose(self, run: ClaimedRun) -> tuple[Resolved, Provider]:
        name = run.processor.partition(":")[0]
        if name in self._broken:
            raise Refused(
                f"No daemon here can use {name}: its code cannot be loaded.",
                code="provider_broken",
                hint=ASK_OPERATOR,
                data={
                    "cure": "The daemon's log says why (provider.broken). Mend that, restart the daemon, and requeue."
                },
            )
        provider = self._providers.get(name)
        model = self._resolve(run)
        if provider is None:
            raise Refused(
                f"No daemon here can use {model.provider}: {setting(model.provider)} is not set.",
                code="no_key",
                hint=ASK_OPERATOR,
                data={"cure": "Set it where the daemon runs, restart that, and requeue the run."},
            )
        return model, provider

    def _resolve(self, run: ClaimedRun) -> Resolved:
        provider = self._providers.get(run.processor.partition(":")[0])
        return resolve(
            run.processor,
            strict=self._policy.strict_models,
            catalogued=provider is None or bool(provider.models),
        )

    def _webhook_wait(self, name: str, provider: Provider) -> timedelta | None:
        """Return how long a webhook may still name a provider job whose response was lost; None where none will."""
        traceable = name in self._policy.webhooks and isinstance(provider, Traceable)
        return self._policy.webhook_wait if traceable else None

    async def _generate(self, provider: Provider, request: Request, reporter: RunReporter) -> Generated | Submitted:
        try:
            async with permit(provider, request):
                await self._lease.wait_fresh()
                self._intake.check()
                made = await finish_call(
                    provider.generate(request, reporter),
                    timeout=self._policy.run_timeout,
                    submitting=lambda: reporter.deferred,
                )
        except TimeoutError:
            seconds = round(self._policy.run_timeout.total_seconds())
            message = f"The provider did not answer within {seconds} s."
            hint = "If it stays so, choose a faster model or a lower quality."
            if reporter.sent:
                raise OutcomeUnknown(message, code="timeout", hint=hint) from None
            raise Retryable(message, code="timeout", hint=hint, accepted=False) from None
        if isinstance(made, Generated) and request.metadata.get("webhookUrl"):
            reporter.warning("webhookUrl has no use here: the image came with the answer.", field="webhookUrl")
        return made

    async def _failed(self, run: ClaimedRun, error: RunError, reporter: RunReporter) -> Failed | Retry:
        if reporter.sent or run.provider_job_id is not None:
            reporter.http_status = error.status
        if error.code == UNREACHABLE:
            self._unreachable.failed(run.processor.partition(":")[0])
        wait = self._retries.next(run)
        if isinstance(error, OutcomeUnknown) and reporter.sent and reporter.webhook_wait is not None:
            wait = max(wait, reporter.webhook_wait.total_seconds())
        outcome = endings.failed(error, run, reporter, wait=wait)
        if isinstance(error, Retryable) and isinstance(outcome, Retry):
            await self._block(run, error, outcome.due_in)
        return outcome

    async def _crashed(self, run: ClaimedRun, reporter: RunReporter) -> Failed | Retry | Parked:
        """Return the outcome of a bug of ours, whose traceback is in the log. A provider job is checked again."""
        if run.provider_job_id is not None and not reporter.sent and reporter.paid is None:
            try:
                return self._polling.put_off(run, run.provider_job_id, endings.check_crashed())
            except Refused as over:
                return await self._failed(run, over, reporter)
        error = endings.crash(reporter)
        return endings.crashed(reporter) if error is None else await self._failed(run, error, reporter)

    async def _without_disk(self, run: ClaimedRun, error: OSError, reporter: RunReporter) -> Failed | Retry | Parked:
        """Return the outcome of a disk that cannot be used: by what was sent, it is tried again at no cost, as the next
        attempt, or checked again."""
        if reporter.sent:
            return await self._failed(run, response_lost(error), reporter)
        reason = nothing_sent(error)
        if run.provider_job_id is None:
            return await self._failed(run, reason, reporter)
        try:
            return self._polling.put_off(run, run.provider_job_id, reason)
        except Refused as over:
            return await self._failed(run, over, reporter)

    async def _block(self, run: ClaimedRun, error: Retryable, wait: float) -> None:
        """Close the provider, or the model that draws, for every daemon, where the error says so."""
        if error.blocks is None:
            return
        resolved = self._resolve(run)
        model = resolved.model if error.blocks == "model" else None
        try:
            await self._queue.block_provider(resolved.provider, model, timedelta(seconds=wait), error.message)
        except Exception as reason:  # noqa: BLE001 - the run's outcome matters more
            log.warning("provider.not_blocked", provider=resolved.provider, error=describe(reason))


def _prompt(run: ClaimedRun, reporter: RunReporter) -> PromptSpec:
    """Read the run's prompt, with warnings about fields that are unknown."""
    prompt = PromptSpec.parse(run.metadata)
    for field in prompt.unknown[:MOST_WARNINGS]:
        reporter.warning(f"promptSpec.{field[:100]} is unknown and was ignored.", field=field[:100])
    if (more := len(prompt.unknown) - MOST_WARNINGS) > 0:
        reporter.warning(f"{more} more fields of promptSpec are unknown and were ignored.", field="promptSpec")
    return prompt
