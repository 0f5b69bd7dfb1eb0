"""Wires the parts, owns their tasks and the signals of the system, and drains before it leaves."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import structlog
from pydantic import SecretStr

from daemon import migrate
from daemon.alerts import Alerts
from daemon.database import explain, may_pass
from daemon.errors import ImageJobsError, Misconfigured
from daemon.fetch.client import Fetcher
from daemon.images.decoder import Decoder
from daemon.log import masker, secrets_of
from daemon.metrics import Metrics, Process
from daemon.providers import PROVIDERS, Provider, create, models
from daemon.queue.client import Queue
from daemon.queue.dispatcher import Dispatcher
from daemon.queue.heartbeat import Heartbeat, State
from daemon.queue.identity import Identity
from daemon.queue.lease import Lease
from daemon.queue.listener import Listener
from daemon.queue.observer import Observer
from daemon.queue.obstacles import Obstacles
from daemon.queue.outage import Outage, describe
from daemon.queue.outbox import Outbox
from daemon.queue.signals import Signals
from daemon.queue.unreachable import Unreachable
from daemon.retention import Retention
from daemon.settings import Settings
from daemon.shutdown import FLUSH_TIMEOUT, LEAVE_TIMEOUT, Shutdown
from daemon.storage.breaker import Breaker
from daemon.storage.client import Storage
from daemon.worker.attempt import Attempts
from daemon.worker.cancellations import Cancellations
from daemon.worker.inputs import Inputs
from daemon.worker.inspector import Inspector
from daemon.worker.intake import Intake
from daemon.worker.keeper import Keeper
from daemon.worker.late_uploads import LateUploads
from daemon.worker.orphans import Orphans
from daemon.worker.polling import Policy, Polling
from daemon.worker.publisher import Publisher
from daemon.worker.retries import Retries
from daemon.worker.room import Room, raise_file_limit
from daemon.worker.uploads import Uploads
from daemon.worker.workdirs import Workdirs
from daemon.worker.worker import Worker

log = structlog.stdlib.get_logger()


async def serve(settings: Settings) -> None:
    """Run the daemon until SIGTERM or SIGINT, then drain; a second signal hands the runs back.

    Raises:
        ImageJobsError: For mistakes that the operator can mend: settings, database, migrations.
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


@dataclass(frozen=True, slots=True)
class Clients:
    """The connections of a daemon to the world."""

    providers: Mapping[str, Provider]
    broken: frozenset[str]
    """Providers whose code cannot be loaded."""
    queue: Queue
    storage: Storage
    conversations: Storage
    kept: Storage
    fetcher: Fetcher
    breaker: Breaker
    decoder: Decoder
    workdirs: Workdirs


class Service:
    """One daemon process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._dsn = _secret(settings.database_url)
        self._metrics = Metrics(settings.metrics_port)
        self._shutdown = Shutdown(settings.drain_timeout.total_seconds())

    async def run(self) -> None:
        """Open the clients, register, work until a signal, drain, leave."""
        with self._shutdown:
            async with AsyncExitStack() as stack:
                signals, lease = Signals(), Lease(self._settings.lease)
                clients = await self._open(stack, signals)
                identity = Identity(self._registration(clients), lease, signals)
                if not await self._join_in_time(clients, identity):
                    return
                await asyncio.to_thread(clients.workdirs.sweep)
                async with asyncio.TaskGroup() as runs:
                    await self._live(clients, identity, lease, signals, runs)

    async def _open(self, stack: AsyncExitStack, signals: Signals) -> Clients:
        settings = self._settings
        # Providers first, since importing an SDK takes a second.
        providers: dict[str, Provider] = {}
        broken: set[str] = set()
        for name in PROVIDERS:
            try:
                provider = create(name, settings)
            except ImageJobsError:
                raise
            except Exception:  # an SDK that cannot be imported costs its provider, and no other
                log.exception("provider.broken", provider=name, consequence="this daemon does not serve it")
                broken.add(name)
                continue
            if provider is not None:
                providers[name] = provider
                stack.push_async_callback(provider.aclose)
        queue = await stack.enter_async_context(Queue(self._dsn, mask=masker(secrets_of(settings))))
        breaker = Breaker(signals.wake)
        storage, conversations, kept = [
            await stack.enter_async_context(
                Storage(
                    settings.supabase_url or "",
                    _secret(settings.service_role_key),
                    bucket=bucket,
                    breaker=of_bucket,
                    private=private,
                )
            )
            for bucket, of_bucket, private in (
                (settings.bucket, breaker, settings.private),
                (settings.conversation_bucket, None, True),
                (settings.kept_bucket, None, True),
            )
        ]
        # It fetches user-supplied URLs: nothing is allow-listed (SSRF). Our own storage goes through `Storage`.
        fetcher = await stack.enter_async_context(Fetcher([]))
        decoder = await stack.enter_async_context(Decoder())
        workdirs = Workdirs(settings.tmp_dir)
        stack.callback(workdirs.close)
        return Clients(
            providers, frozenset(broken), queue, storage, conversations, kept, fetcher, breaker, decoder, workdirs
        )

    def _registration(self, clients: Clients) -> Callable[[UUID], Awaitable[None]]:
        """Return the call that registers an id as this daemon."""
        return partial(
            clients.queue.register_daemon,
            name=socket.gethostname(),
            version=version("image-job-orchestrator"),
            slots=self._settings.concurrency,
            lease=self._settings.lease,
            providers=sorted(clients.providers),
            unserved_grace=self._settings.unserved_grace,
        )

    async def _join_in_time(self, clients: Clients, identity: Identity) -> bool:
        """Join, and wait for a database that is away. Returns False if a signal came first.

        Raises:
            ImageJobsError: For what waiting does not mend: user, password, the database's name, rights, settings, migrations.
        """
        outage = Outage("database.away", "database.back")
        while not self._shutdown.draining.is_set():
            try:
                await self._join(clients, identity)
            except Exception as error:
                if not may_pass(error):
                    raise explain(error) if isinstance(error, asyncpg.PostgresError) else error from error
                pause = outage.failed(error)
            else:
                outage.passed()
                return True
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._shutdown.draining.wait()
        return False

    async def _join(self, clients: Clients, identity: Identity) -> None:
        """Check the database's migrations, register the daemon, and publish its models."""
        if missing := await migrate.pending(self._dsn):
            raise ImageJobsError(
                f"The database lacks the migration{'s' * (len(missing) > 1)} {', '.join(missing)}.",
                "Run image-jobs migrate.",
            )
        await self._set_webhook_secrets(clients.queue)
        await identity.join()
        for name, provider in clients.providers.items():
            models = [_published(name, model) for model in map(asdict, provider.models)]
            await clients.queue.publish_models(name, models)

    async def _set_webhook_secrets(self, queue: Queue) -> None:
        """Put the secrets of webhooks where only their verifier can read them."""
        secrets = {
            name: [secret.get_secret_value() for secret in several]
            for name, several in self._settings.webhook_secrets.items()
        }
        if not secrets:
            return
        try:
            await queue.set_webhook_secrets(secrets)
        except asyncpg.InvalidParameterValueError as error:
            raise Misconfigured(
                f"A WEBHOOK_SECRET cannot be used: {error.args[0]}",
                "Set WEBHOOK_SECRET_OPENAI to the whsec_… that OpenAI showed, whole; all others to any text of 16 bytes and more.",
            ) from error

    async def _live(
        self, clients: Clients, identity: Identity, lease: Lease, signals: Signals, runs: asyncio.TaskGroup
    ) -> None:
        """Wire the parts from the queue to the worker and back, and run them until the daemon is drained."""
        settings, queue, providers = self._settings, clients.queue, clients.providers
        outbox, unreachable = Outbox(signals, self._metrics.settled), Unreachable()
        raise_file_limit(settings.concurrency)
        intake = Intake(clients.breaker, Room(settings.tmp_dir, picture_bytes=settings.max_image_bytes))
        late = LateUploads(clients.storage, clients.kept, clients.workdirs, max_bytes=settings.max_image_bytes)
        worker = self._worker(clients, runs, outbox, lease, intake, late=late, unreachable=unreachable)
        dispatcher = Dispatcher(
            queue,
            identity,
            signals,
            outbox,
            unreachable=unreachable,
            slots=settings.concurrency,
            start=worker.start,
            drop=worker.drop,
            intake=intake.slots,
        )
        listener = Listener(self._dsn, identity, signals, drop=worker.drop)
        heartbeat = Heartbeat(
            queue,
            identity,
            lease,
            lambda: State(dispatcher.held, listener.session_lock, self._shutdown.draining.is_set()),
        )
        breaker = clients.breaker
        obstacles = Obstacles(queue, identity, unreachable, lambda: breaker.closed and breaker.reason is not None)
        orphans = Orphans(queue, signals, providers)
        cancellations = Cancellations(queue, signals, providers)
        buckets = (settings.bucket, settings.conversation_bucket, settings.kept_bucket)
        retention = Retention(queue, signals, clients.storage, buckets, keep=settings.retention)

        if self._metrics.served:
            self._metrics.watch(
                _model_names(clients), lambda: self._process(clients, dispatcher, outbox, listener, lease)
            )

        async with asyncio.TaskGroup() as infra:
            tasks = [
                infra.create_task(listener.run(), name="listener"),
                infra.create_task(heartbeat.run(), name="heartbeat"),
                infra.create_task(breaker.run(clients.storage.probe), name="storage"),
                infra.create_task(obstacles.run(), name="obstacles"),
                infra.create_task(late.run(), name="late uploads"),
                infra.create_task(dispatcher.run(), name="dispatcher"),
                infra.create_task(orphans.run(), name="orphans"),
                infra.create_task(cancellations.run(), name="cancellations"),
                infra.create_task(retention.run(), name="retention"),
                infra.create_task(Observer(queue, self._metrics).run(), name="observer"),
            ]
            if settings.alert_url is not None:
                alerts = Alerts(queue, settings.alert_url, project=urlsplit(settings.supabase_url or "").netloc)
                tasks.append(infra.create_task(alerts.run(), name="alerts"))
            log.info("daemon.started", daemon=str(identity.id), slots=settings.concurrency, providers=sorted(providers))
            await self._shutdown.draining.wait()
            await self._drain(dispatcher, worker)
            for task in tasks:
                task.cancel()
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT):
                await queue.leave(identity.id)
        except Exception as error:  # noqa: BLE001 - whatever the database says, the daemon leaves
            log.warning("daemon.left_silently", error=describe(error))
        log.info("daemon.stopped", daemon=str(identity.id))

    def _process(
        self, clients: Clients, dispatcher: Dispatcher, outbox: Outbox, listener: Listener, lease: Lease
    ) -> Process:
        """Return the state of this process, for a scrape: from another thread, which reads only numbers here."""
        stores = (clients.storage, clients.conversations, clients.kept)
        return Process(
            slots=self._settings.concurrency,
            held=dispatcher.held,
            outbox=len(outbox),
            listener_connected=listener.hears,
            last_beat_seconds=lease.silent,
            uploads_stored=sum(store.uploads_stored for store in stores),
            uploads_failed=sum(store.uploads_failed for store in stores),
            base64_refused=clients.queue.base64_refused,
        )

    def _worker(
        self,
        clients: Clients,
        runs: asyncio.TaskGroup,
        outbox: Outbox,
        lease: Lease,
        intake: Intake,
        *,
        late: LateUploads,
        unreachable: Unreachable,
    ) -> Worker:
        """Wire the worker: from a claimed run to an outcome in the outbox."""
        settings = self._settings
        policy = Policy(
            run_timeout=settings.run_timeout,
            poll_interval=settings.poll_interval,
            poll_timeout=settings.poll_timeout,
            webhook_wait=min(settings.webhook_wait, settings.poll_timeout),
            webhooks=frozenset(settings.webhook_secrets),
            strict_models=settings.strict_models,
        )
        retries = Retries()
        inspector = Inspector(clients.decoder, settings.max_image_bytes, settings.max_image_pixels)
        uploads = Uploads(clients.storage, clients.conversations, outbox, lease, inspector, late=late)
        publisher = Publisher(clients.storage, uploads, inspector, Keeper(clients.kept, outbox), lease)
        attempts = Attempts(
            clients.queue,
            lease,
            inputs=Inputs(clients.storage, clients.conversations, clients.fetcher, inspector),
            polling=Polling(lease, policy),
            publisher=publisher,
            intake=intake,
            retries=retries,
            unreachable=unreachable,
            providers=clients.providers,
            broken=clients.broken,
            policy=policy,
            workdirs=clients.workdirs,
        )
        return Worker(
            runs,
            outbox,
            attempts=attempts,
            publisher=publisher,
            retries=retries,
            app_url=settings.app_url,
        )

    async def _drain(self, dispatcher: Dispatcher, worker: Worker) -> None:
        """Claim nothing more and let runs finish; after a second signal, or out of time, hand them back."""
        dispatcher.accepting = False
        log.info("daemon.draining", runs=dispatcher.held)
        try:
            async with asyncio.timeout(self._settings.drain_timeout.total_seconds()):
                await self._until_idle(dispatcher)
        except TimeoutError:
            log.warning("daemon.out_of_time", runs=dispatcher.held)
        if not dispatcher.idle:
            worker.hand_back()
            try:
                async with asyncio.timeout(FLUSH_TIMEOUT):
                    await dispatcher.wait_idle()
            except TimeoutError:
                log.warning("daemon.not_flushed", runs=dispatcher.held)
                worker.hand_back(storing_too=True)

    async def _until_idle(self, dispatcher: Dispatcher) -> None:
        """Return once all runs are written back, or after a second signal."""
        idle = asyncio.ensure_future(dispatcher.wait_idle())
        insisted = asyncio.ensure_future(self._shutdown.insisted.wait())
        try:
            await asyncio.wait({idle, insisted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            idle.cancel()
            insisted.cancel()


def _model_names(clients: Clients) -> dict[str, frozenset[str]]:
    """Return the models of each provider whose code can be loaded, set up here or not: the labels of metrics."""
    names = [name for name in PROVIDERS if name not in clients.broken]
    return {name: frozenset(model.name for model in models(name)) for name in names}


def _published(provider: str, model: Mapping[str, object]) -> dict[str, object]:
    """Return a model as `image_models` shows it."""
    fields = dict(model)
    return {"provider": provider, "model": fields.pop("name"), **fields}


def _secret(value: SecretStr | None) -> str:
    """Return the plain text of a secret that `serve` has checked."""
    return value.get_secret_value() if value is not None else ""
