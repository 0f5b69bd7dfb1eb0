"""Wires the parts, owns their tasks and the signals, and leaves in good order."""

import asyncio
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict
from importlib.metadata import version
from uuid import UUID, uuid4

import asyncpg
import structlog
from pydantic import SecretStr

from daemon import migrate
from daemon.cancellations import Cancellations
from daemon.errors import ImageJobsError
from daemon.fetch import Fetcher
from daemon.heartbeat import Heartbeat
from daemon.inbox import Inbox
from daemon.listener import Listener
from daemon.log import masker, secrets_of
from daemon.metrics import Metrics
from daemon.policy import Policy
from daemon.providers import PROVIDERS, Provider, create
from daemon.publisher import Publisher
from daemon.queue import UNAVAILABLE, Claimed, Queue
from daemon.settings import Settings
from daemon.storage import Storage
from daemon.turns import Turns
from daemon.worker import Worker

log = structlog.stdlib.get_logger()

FLUSH_TIMEOUT = 10.0
"""Seconds to write back what was handed back, before leaving all the same: the lease brings the rest back."""


async def serve(settings: Settings) -> None:
    """Runs the daemon until SIGTERM or SIGINT, then drains; a second signal hands the runs back.

    Raises:
        ImageJobsError: For what the operator can mend: settings, database, migrations.
    """
    required = {
        "DATABASE_URL": settings.database_url,
        "SUPABASE_URL": settings.supabase_url,
        "SUPABASE_SERVICE_ROLE_KEY": settings.service_role_key,
    }
    if missing := [name for name, value in required.items() if value is None]:
        raise ImageJobsError(
            f"{' and '.join(missing)} must be set.", "Set them in the environment or in a .env file; see the README."
        )
    await Service(settings).run()


class Service:
    """One daemon process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._id = uuid4()
        self._metrics = Metrics(settings.metrics_port)
        self._joining = asyncio.Lock()
        self._draining = asyncio.Event()
        self._insisted = asyncio.Event()

    async def run(self) -> None:
        """From the first connection to the last."""
        settings = self._settings
        dsn = _secret(settings.database_url)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            async with AsyncExitStack() as stack:
                providers = await self._providers(stack)
                queue = await stack.enter_async_context(Queue(dsn, mask=masker(secrets_of(settings))))
                await self._begin(dsn, queue, providers)
                storage, contexts = [
                    await stack.enter_async_context(
                        Storage(settings.supabase_url or "", _secret(settings.service_role_key), bucket=bucket)
                    )
                    for bucket in (settings.bucket, settings.context_bucket)
                ]
                # Strangers name what it fetches, so no configured address is open to it; our own storage is asked as such.
                fetcher = await stack.enter_async_context(Fetcher([]))
                async with asyncio.TaskGroup() as runs:
                    await self._live(dsn, queue, storage, contexts, fetcher, providers=providers, runs=runs)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _live(
        self,
        dsn: str,
        queue: Queue,
        storage: Storage,
        contexts: Storage,
        fetcher: Fetcher,
        *,
        providers: Mapping[str, Provider],
        runs: asyncio.TaskGroup,
    ) -> None:
        settings = self._settings

        async def rejoin(former: UUID) -> None:
            sent = time.monotonic()
            if await self._rejoin(former, queue, providers):
                heartbeat.renewed(sent)
                turns.look_closely()

        # The worker is made last, since it needs the others; they call it only once they run.
        def start(run: Claimed) -> None:
            worker.start(run)

        def drop(claims: set[int]) -> None:
            worker.drop(claims)
            cancellations.look()

        def connected() -> None:
            turns.look_closely()
            inbox.look()
            cancellations.look()

        inbox = Inbox(queue, providers)
        cancellations = Cancellations(queue, providers)

        turns = Turns(
            queue,
            daemon=lambda: self._id,
            slots=settings.concurrency,
            start=start,
            lost=drop,
            fenced=rejoin,
        )
        listener = Listener(
            dsn,
            daemon=lambda: self._id,
            wake=turns.wake,
            connected=connected,
            drop=drop,
        )
        heartbeat = Heartbeat(
            queue,
            lease=settings.lease,
            daemon=lambda: self._id,
            state=lambda: (turns.held, listener.session_lock, self._draining.is_set()),
            fenced=rejoin,
        )
        worker = Worker(
            runs,
            queue=queue,
            turns=turns,
            heartbeat=heartbeat,
            storage=storage,
            contexts=contexts,
            fetcher=fetcher,
            publisher=Publisher(
                storage,
                contexts,
                turns,
                heartbeat,
                max_bytes=settings.max_image_bytes,
                max_pixels=settings.max_image_pixels,
            ),
            providers=providers,
            policy=Policy(
                run_timeout=settings.run_timeout,
                poll_interval=settings.poll_interval,
                poll_timeout=settings.poll_timeout,
                webhook_wait=min(settings.webhook_wait, settings.poll_timeout),
                webhooks=frozenset(settings.webhook_secrets),
                strict_models=settings.strict_models,
                max_image_bytes=settings.max_image_bytes,
            ),
            metrics=self._metrics,
            tmp_dir=settings.tmp_dir,
            app_url=settings.app_url,
        )
        async with asyncio.TaskGroup() as infra:
            tasks = [
                infra.create_task(listener.run(), name="listener"),
                infra.create_task(heartbeat.run(), name="heartbeat"),
                infra.create_task(turns.run(), name="turns"),
                infra.create_task(inbox.run(), name="inbox"),
                infra.create_task(cancellations.run(), name="cancellations"),
            ]
            log.info("daemon.started", daemon=str(self._id), slots=settings.concurrency, providers=sorted(providers))
            await self._draining.wait()
            await self._drain(turns, worker)
            for task in tasks:
                task.cancel()
        try:
            await queue.leave(self._id)
        except UNAVAILABLE as error:
            log.warning("daemon.left_silently", error=type(error).__name__)
        log.info("daemon.stopped", daemon=str(self._id))

    def _on_signal(self) -> None:
        if self._draining.is_set():
            self._insisted.set()
        self._draining.set()

    async def _providers(self, stack: AsyncExitStack) -> dict[str, Provider]:
        """Those that have a key. Made before anything else, since importing an SDK takes a second."""
        made: dict[str, Provider] = {}
        for name in PROVIDERS:
            provider = create(name, self._settings)
            if provider is not None:
                made[name] = provider
                stack.push_async_callback(provider.aclose)
        return made

    async def _begin(self, dsn: str, queue: Queue, providers: Mapping[str, Provider]) -> None:
        """Makes sure that the database is one to work with, and registers."""
        if missing := await migrate.pending(dsn):
            raise ImageJobsError(
                f"The database lacks the migration{'s' * (len(missing) > 1)} {', '.join(missing)}.",
                "Run image-jobs migrate.",
            )
        await self._hand_over_secrets(queue)
        await self._join(queue, providers)
        for name, provider in providers.items():
            await queue.publish(name, [_published(name, model) for model in map(asdict, provider.models)])

    async def _hand_over_secrets(self, queue: Queue) -> None:
        """Puts what verifies webhooks where only the verifier can read it."""
        secrets = {
            name: [secret.get_secret_value() for secret in several]
            for name, several in self._settings.webhook_secrets.items()
        }
        if not secrets:
            return
        try:
            await queue.set_webhook_secrets(secrets)
        except asyncpg.InvalidParameterValueError as error:
            raise ImageJobsError(
                f"A WEBHOOK_SECRET cannot be used: {error.args[0]}",
                "Set WEBHOOK_SECRET_OPENAI to the whsec_… that OpenAI showed, whole; all others to any text of 16 bytes and more.",
            ) from error

    async def _join(self, queue: Queue, providers: Mapping[str, Provider]) -> None:
        await queue.register(
            self._id,
            name=socket.gethostname(),
            version=version("image-job-orchestrator"),
            slots=self._settings.concurrency,
            lease=self._settings.lease,
            providers=sorted(providers),
        )

    async def _rejoin(self, former: UUID, queue: Queue, providers: Mapping[str, Provider]) -> bool:
        """Registers under a new id, once, however many parts noticed that the former one was fenced.

        Returns:
            Whether this call did it.
        """
        async with self._joining:
            if self._id != former:
                return False
            successor = uuid4()
            self._id = successor
            try:
                await self._join(queue, providers)
            except BaseException:
                self._id = former
                raise
            log.warning("daemon.rejoined", former=str(former), daemon=str(successor))
            return True

    async def _drain(self, turns: Turns, worker: Worker) -> None:
        """Claims nothing more and lets runs finish; when told twice, or out of time, hands them back."""
        turns.accepting = False
        log.info("daemon.draining", runs=turns.held)
        try:
            async with asyncio.timeout(self._settings.drain_timeout.total_seconds()):
                await self._until_idle(turns)
        except TimeoutError:
            log.warning("daemon.out_of_time", runs=turns.held)
        if not turns.idle:
            worker.hand_back()
            try:
                async with asyncio.timeout(FLUSH_TIMEOUT):
                    await turns.wait_idle()
            except TimeoutError:
                log.warning("daemon.not_flushed", runs=turns.held)
                worker.hand_back(storing_too=True)

    async def _until_idle(self, turns: Turns) -> None:
        idle = asyncio.ensure_future(turns.wait_idle())
        insisted = asyncio.ensure_future(self._insisted.wait())
        try:
            await asyncio.wait({idle, insisted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            idle.cancel()
            insisted.cancel()


def _published(provider: str, model: Mapping[str, object]) -> dict[str, object]:
    """A model as `image_models` shows it."""
    fields = dict(model)
    return {"provider": provider, "model": fields.pop("name"), **fields}


def _secret(value: SecretStr | None) -> str:
    """The plain text of a secret that `serve` has made sure of."""
    return value.get_secret_value() if value is not None else ""
