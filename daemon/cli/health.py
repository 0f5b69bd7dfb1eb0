"""doctor and check: is everything there, and does it work."""

import asyncio
import socket
from dataclasses import asdict
from uuid import uuid4

import typer

from daemon.cli.console import AsJson, database_url, load_settings, print_json
from daemon.cli.finding import Finding
from daemon.database import Connection, connected, place, refuse_transaction_pooler
from daemon.errors import ImageJobsError
from daemon.settings import Settings

NOTIFICATION_TIMEOUT = 2.0
"""Seconds for a notification to come back."""

OLDEST_POSTGRES = 150000


def doctor(as_json: AsJson = False) -> None:
    """Examine everything the daemon needs, each with a cure.

    Example: image-jobs doctor
    """
    settings = load_settings()
    findings = asyncio.run(_examine(settings))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    for finding in () if as_json else findings:
        colour = {"ok": "green", "info": "blue", "problem": "red"}[finding.state]
        typer.echo(f"{typer.style(f'{finding.state:<8}', fg=colour)} {finding.name:<12} {finding.message}")
        if finding.cure:
            typer.echo(f"{'':<21} {finding.cure}")
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


def check(as_json: AsJson = False) -> None:
    """Answer whether this host's daemon is alive.

    It is the health probe of a container.

    Example: HEALTHCHECK CMD ["image-jobs", "check"]
    """
    host = socket.gethostname()
    states = asyncio.run(_states(database_url(load_settings()), host))
    alive = not {"alive", "draining"}.isdisjoint(states)
    if as_json:
        print_json({"host": host, "alive": alive, "states": states})
    elif alive:
        typer.echo(f"The daemon on {host} is alive.")
    if not alive:
        raise ImageJobsError(
            f"The daemon on {host} is {states[0]}." if states else f"No daemon has ever run on {host}.",
            "Start it with image-jobs run, and look at its log.",
        )


async def _states(dsn: str, host: str) -> list[str]:
    async with connected(dsn, timeout=5) as connection:
        rows = await connection.fetch("select state from public.daemons where name = $1 order by seen_at desc", host)
        return [row["state"] for row in rows]


async def _examine(settings: Settings) -> list[Finding]:
    findings: list[Finding] = []
    served: list[str] = []
    try:
        dsn = database_url(settings)
        refuse_transaction_pooler(dsn)
        async with connected(dsn) as connection:
            findings += [await _server(dsn, connection), await _listen(connection)]
            migrations = await _migrations(dsn)
            findings.append(migrations)
            if migrations.state == "ok":
                alive, served = await _alive(connection)
                findings.append(Finding("daemons", "info", f"{alive} alive, serving {', '.join(served) or 'nothing'}."))
                findings += await _webhooks(settings, connection)
            findings.append(await _publication(connection))
    except ImageJobsError as error:
        findings.append(_problem("database", error))
    findings += [await _storage(settings), await _keys(settings, served)]
    return findings


async def _server(dsn: str, connection: Connection) -> Finding:
    number = int(await connection.fetchval("select current_setting('server_version_num')"))
    release = await connection.fetchval("select current_setting('server_version')")
    if number < OLDEST_POSTGRES:
        return Finding("database", "problem", f"{place(dsn)} is PostgreSQL {release}.", "Upgrade it to 15 or newer.")
    return Finding("database", "ok", f"PostgreSQL {release} at {place(dsn)}.")


async def _migrations(dsn: str) -> Finding:
    from daemon.migrate import pending

    try:
        missing = await pending(dsn)
    except ImageJobsError as error:
        return _problem("migrations", error)
    if missing:
        return Finding("migrations", "problem", f"Missing: {', '.join(missing)}.", "Run image-jobs migrate.")
    return Finding("migrations", "ok", "All have run.")


async def _alive(connection: Connection) -> tuple[int, list[str]]:
    """How many daemons live, and what they serve."""
    rows = await connection.fetch("select providers from public.daemons where state = 'alive'")
    return len(rows), sorted({provider for row in rows for provider in row["providers"]})


async def _publication(connection: Connection) -> Finding:
    published = await connection.fetchval(
        "select exists (select from pg_publication_tables where pubname = 'supabase_realtime' "
        "and schemaname = 'public' and tablename = 'workflow_nodes')"
    )
    message = (
        "workflow_nodes is in supabase_realtime."
        if published
        else "workflow_nodes is not in supabase_realtime: subscriptions to postgres_changes get nothing."
    )
    return Finding("publication", "info", message)


async def _listen(connection: Connection) -> Finding:
    """Notifies itself: a pooler in between would swallow LISTEN without an error."""
    heard = asyncio.Event()
    channel = f"image_jobs_probe_{uuid4().hex}"

    def hear(*_: object) -> None:
        heard.set()

    await connection.add_listener(channel, hear)
    await connection.execute("select pg_notify($1, '')", channel)
    try:
        await asyncio.wait_for(heard.wait(), NOTIFICATION_TIMEOUT)
    except TimeoutError:
        return Finding(
            "listen",
            "problem",
            "Notifications do not arrive, so runs start up to a second late.",
            "Point DATABASE_URL at the direct connection or the session pooler (port 5432).",
        )
    return Finding("listen", "ok", "Notifications arrive.")


async def _webhooks(settings: Settings, connection: Connection) -> list[Finding]:
    if not settings.webhook_secrets:
        return [Finding("webhooks", "info", "No secret is set, so none are accepted: what takes long is polled.")]
    from daemon.cli.webhooks import try_webhook

    return [await try_webhook(settings, connection, name) for name in settings.webhook_secrets]


async def _storage(settings: Settings) -> Finding:
    key = settings.service_role_key
    if settings.supabase_url is None or key is None:
        return Finding(
            "storage",
            "problem",
            "SUPABASE_URL or SUPABASE_SERVICE_ROLE_KEY is not set.",
            "Both are in the project's API settings.",
        )
    from daemon.storage import Storage

    url, second = settings.supabase_url, settings.context_bucket
    try:
        async with Storage(url, key.get_secret_value(), bucket=settings.bucket) as storage:
            await storage.check()
        async with Storage(url, key.get_secret_value(), bucket=second) as contexts:
            public = await contexts.visibility()
    except ImageJobsError as error:
        return _problem("storage", error)
    if public is None:
        missing = f"The bucket {second} is missing: images are refined without the conversation that made them."
        return Finding("storage", "info", missing, "Run image-jobs migrate.")
    if public:
        cure = "Make it private: in the dashboard under Storage, or by SQL in storage.buckets."
        return Finding("storage", "info", f"The bucket {second} is public, and need not be.", cure)
    return Finding("storage", "ok", f"Buckets {settings.bucket} and {second} at {url}.")


async def _keys(settings: Settings, served: list[str]) -> Finding:
    from daemon.providers import PROVIDERS, available, setting

    try:
        there = await available(settings)
    except ImageJobsError as error:
        return _problem("providers", error)
    if there:
        return Finding("providers", "ok", f"{', '.join(there)}.")
    if served:
        return Finding("providers", "info", f"None has a key here; the daemons that live serve {', '.join(served)}.")
    keys = [setting(name) for name in PROVIDERS if name != "demo"]
    return Finding(
        "providers",
        "problem",
        "No provider has a key.",
        f"Set {' or '.join(keys)}; IMAGE_JOBS_DEMO=1 offers demo:painter, which needs none.",
    )


def _problem(name: str, error: ImageJobsError) -> Finding:
    return Finding(name, "problem", error.message, error.hint)
