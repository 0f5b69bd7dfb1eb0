"""Checks of the database: version, notifications, migrations, connections."""

import asyncio
from uuid import uuid4

from daemon.cli.doctor.finding import Finding, failed
from daemon.database import CONNECTIONS, Connection, connected, place
from daemon.errors import ImageJobsError

NOTIFICATION_TIMEOUT = 2.0
"""Seconds for a notification to come back."""

OLDEST_POSTGRES = 150000

SESSION_POOL = 15
"""Connections of a new project's session pooler. What it has been set to, it tells to nobody."""


async def check_server(dsn: str, connection: Connection) -> Finding:
    """Compare the server's version with the oldest that is supported."""
    number = int(await connection.fetchval("select current_setting('server_version_num')"))
    release = await connection.fetchval("select current_setting('server_version')")
    if number < OLDEST_POSTGRES:
        return Finding("database", "problem", f"{place(dsn)} is PostgreSQL {release}.", "Upgrade it to 15 or newer.")
    return Finding("database", "ok", f"PostgreSQL {release} at {place(dsn)}.")


async def check_listen(dsn: str, connection: Connection) -> Finding:
    """Send a notification to this connection: a pooler in between would swallow LISTEN without an error."""
    received = asyncio.Event()
    channel = f"image_jobs_probe_{uuid4().hex}"

    def on_notification(*_: object) -> None:
        received.set()

    await connection.add_listener(channel, on_notification)
    await connection.execute("select pg_notify($1, '')", channel)
    try:
        async with asyncio.timeout(NOTIFICATION_TIMEOUT):
            await received.wait()
    except TimeoutError:
        cure = "Point DATABASE_URL at the direct connection or the session pooler (port 5432)."
        if await changes_backend(dsn, connection):
            message = f"A pooler in transaction mode stands at {place(dsn)}: notifications do not arrive, nor are sessions kept."
            return Finding("listen", "problem", message, cure)
        return Finding("listen", "problem", "Notifications do not arrive, so runs start up to a second late.", cure)
    return Finding("listen", "ok", "Notifications arrive.")


async def changes_backend(dsn: str, connection: Connection) -> bool:
    """Return whether another connection's transaction can take this one's backend: so it is in transaction mode alone."""
    first = await connection.fetchval("select pg_backend_pid()")
    async with connected(dsn) as other, other.transaction():
        await other.fetchval("select pg_backend_pid()")
        return bool(await connection.fetchval("select pg_backend_pid()") != first)


async def check_migrations(dsn: str) -> Finding:
    """Look for migrations that have not run, or that are not the ones of this release."""
    from daemon.migrate import pending

    try:
        missing = await pending(dsn)
    except ImageJobsError as error:
        return failed("migrations", error)
    if missing:
        return Finding("migrations", "problem", f"Missing: {', '.join(missing)}.", "Run image-jobs migrate.")
    return Finding("migrations", "ok", "All have run.")


async def check_connections(dsn: str, connection: Connection, daemons: int) -> Finding:
    """Compare the connections of the daemons that are alive, or of one, with those that there are."""
    wanted = max(daemons, 1) * CONNECTIONS
    need = (
        f"{daemons} daemon{'s' * (daemons != 1)} hold{'s' * (daemons == 1)} up to {wanted} connections"
        if daemons
        else ""
    )
    need = need or f"A daemon holds up to {wanted} connections"
    if ".pooler." in place(dsn):
        if wanted > SESSION_POOL:
            cure = f"Set the pool size to {wanted} and more (database settings), or use the direct connection."
            return Finding("connections", "info", f"{need}; a new session pooler has {SESSION_POOL}.", cure)
        return Finding("connections", "ok", f"{need}; a new session pooler has {SESSION_POOL}.")
    left: int = await connection.fetchval(
        "select current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
        " - count(*)::int from pg_stat_activity"
        " where backend_type = 'client backend' and application_name not like 'image-jobs%'"
    )
    if wanted > left:
        cure = "Raise max_connections, or end what holds so many (pg_stat_activity)."
        return Finding("connections", "problem", f"{need}; others leave {max(left, 0)}.", cure)
    return Finding("connections", "ok", f"{need}; others leave {left}.")


async def check_plugins(connection: Connection) -> list[Finding]:
    """Look whether Realtime may decode changes: since 15.19 and its like, the server has a list of what may."""
    allowed = await connection.fetchval(
        "select current_setting('output_plugin_libraries', true) where exists ("
        " select from pg_publication_tables where pubname = 'supabase_realtime')"
    )
    if allowed is None or "wal2json" in {name.strip(' "') for name in allowed.split(",")}:
        return []
    return [
        Finding(
            "realtime",
            "info",
            "output_plugin_libraries does not list wal2json: subscriptions to postgres_changes may get nothing (broadcasts do).",
            f"As a superuser: alter system set output_plugin_libraries = {', '.join(filter(None, (allowed, 'wal2json')))};"
            " then select pg_reload_conf();",
        )
    ]
