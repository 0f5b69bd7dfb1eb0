"""`image-jobs dev`: starts everything on one machine, in order, and stops it in reverse.

Postgres and the daemon are processes of their own; the stand-in for Supabase's endpoints runs in this one. The daemon is
configured as a deployed one: by addresses and keys in its environment.
"""

import asyncio
import os
import shlex
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from datetime import datetime
from pathlib import Path
from typing import NoReturn

import asyncpg
import typer

import daemon
from daemon.database import Connection, connected
from daemon.dev.canvas import canvas_app, create_first_workflow
from daemon.dev.feed import Feed
from daemon.dev.guard import Guard
from daemon.dev.home import Home
from daemon.dev.postgres import Server, embedded_bin_dir
from daemon.dev.supabase.auth import auth_app
from daemon.dev.supabase.gateway import is_free, listen, one_port, serving
from daemon.dev.supabase.keys import load_keys
from daemon.dev.supabase.realtime import realtime_app
from daemon.dev.supabase.rest import rest_app
from daemon.dev.supabase.storage import storage_app
from daemon.errors import ImageJobsError
from daemon.migrate import migrate
from daemon.pages.dashboard import PREFIX, dashboard_app
from daemon.pages.dashboard.server import new_token
from daemon.providers import PROVIDERS, available, setting
from daemon.running_dev import registered
from daemon.settings import Settings

DAEMON_DEFAULTS = {"IMAGE_JOBS_LEASE": "10", "IMAGE_JOBS_DRAIN_TIMEOUT": "30"}
"""Shorter than a deployed daemon's: a developer is waiting at the terminal."""

FRONTENDS = ("VITE_", "NEXT_PUBLIC_")
"""Prefixes without which Vite and Next.js show a variable to no page."""

DRAIN_TIMEOUT = 60.0
"""Seconds for the daemon to end after SIGTERM, before it is killed."""


def start(*, data: Path, port: int, fresh: bool, realtime_limit: int | None, settings: Settings) -> None:
    """Run everything until Ctrl-C, SIGTERM or SIGHUP; keep the data.

    Args:
        data: The data directory.
        port: Of the Supabase endpoints.
        fresh: Delete the data first.
        realtime_limit: Messages a second to clients, beyond which Realtime drops them; None for no limit.
        settings: For the bucket, and the keys of providers.

    Raises:
        ImageJobsError: If a port or the directory is taken, or a part ends by itself.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with ExitStack() as parts:
            home = parts.enter_context(Home(data))
            listening = parts.enter_context(closing(listen(port)))
            if fresh:
                home.clear()
            guard = parts.enter_context(Guard(home.lock))
            typer.secho("  Starting Postgres, storage and the daemon …", dim=True)
            server = _start_postgres(home)
            parts.callback(server.stop)
            if server.pid is not None:
                guard.watch(server.pid)
            asyncio.run(Stack(home, server, listening, guard, settings, realtime_limit=realtime_limit).run())
    except KeyboardInterrupt:
        return


class Stack:
    """Everything but Postgres: the endpoints, the daemon, the feed."""

    def __init__(
        self,
        home: Home,
        server: Server,
        listening: socket.socket,
        guard: Guard,
        settings: Settings,
        *,
        realtime_limit: int | None,
    ) -> None:
        self._home = home
        self._server = server
        self._listening = listening
        self._guard = guard
        self._settings = settings
        self._realtime_limit = realtime_limit
        self._dsn = server.dsn(user="postgres")
        self._url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._token = new_token()
        self._signals = 0
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Run until a signal. Return when everything but Postgres has ended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        async with connected(self._server.dsn()) as superuser:
            await superuser.execute((Path(__file__).parent / "supabase/project.sql").read_text())
        await migrate(self._dsn, bucket=self._settings.bucket, private=self._settings.private)
        keys = load_keys(self._home.directory)
        environment = {
            "DATABASE_URL": self._dsn,
            "SUPABASE_URL": self._url,
            "SUPABASE_ANON_KEY": keys.anon_key,
            "SUPABASE_SERVICE_ROLE_KEY": keys.service_role_key,
            **({"IMAGE_JOBS_PRIVATE": "1"} if self._settings.private else {}),
        }
        as_gateway = self._server.dsn(user="authenticator")
        async with (
            asyncpg.create_pool(self._dsn, min_size=0) as pool,
            asyncpg.create_pool(as_gateway, min_size=0) as rest,
            asyncpg.create_pool(self._server.dsn(user="supabase_auth_admin"), min_size=0, max_size=4) as auth,
            realtime_app(self._dsn, pool, keys, messages_per_second=self._realtime_limit) as realtime,
            dashboard_app(self._dsn, self._token) as dashboard,
        ):
            apps = {
                "/auth/v1": auth_app(auth, keys, self._url),
                "/storage/v1": storage_app(pool, self._home.storage, keys),
                "/rest/v1": rest_app(rest, keys),
                "/realtime/v1": realtime,
                "/canvas": canvas_app(keys),
                PREFIX: dashboard,
            }
            async with serving(one_port(apps), self._listening), connected(self._dsn) as connection:
                await self._work(connection, environment)

    async def _work(self, connection: Connection, environment: Mapping[str, str]) -> None:
        """Run the daemon and print its events, until a signal."""
        feed = Feed(connection)
        await feed.poll()
        since = await connection.fetchval("select image_jobs.now()")
        process = await self._start_daemon(environment)
        parts = {
            asyncio.create_task(self._watch(connection, feed, environment, since), name="watch"),
            asyncio.create_task(process.wait(), name="daemon"),
            asyncio.create_task(self._stopping.wait(), name="signals"),
        }
        try:
            ended, others = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for each in ended:
                await each  # raises why: watching does not end by itself
            if not self._stopping.is_set():
                self._explain_end(process.returncode)
            await self._drain(process)
            for each in others:
                each.cancel()
            await asyncio.wait(parts)
            await feed.poll()
        finally:
            for each in parts:
                each.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _watch(self, connection: Connection, feed: Feed, environment: Mapping[str, str], since: datetime) -> None:
        """Wait for the daemon, then print the first screen and the feed. A daemon that was killed may still look alive."""
        ready = "select exists (select from image_jobs.daemon_status where state = 'alive' and started_at >= $1)"
        while not await connection.fetchval(ready, since):  # noqa: ASYNC110 - another process sets it
            await asyncio.sleep(0.05)
        self._home.write_environment({**environment, **frontend_environment(environment)})
        with registered(self._home.directory, self._url):
            await self._welcome(connection)
            await feed.run()

    async def _start_daemon(self, environment: Mapping[str, str]) -> asyncio.subprocess.Process:
        package = Path(daemon.__file__).parents[1]
        with self._home.daemon_log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(
                    sys.executable,
                    "-P",
                    "-m",
                    "daemon",
                    "run",
                ),  # -P: a daemon/ in the working directory is not this package
                env={
                    **DAEMON_DEFAULTS,
                    **os.environ,
                    **environment,
                    "IMAGE_JOBS_DEMO": "1",
                    "APP_URL": f"{self._url}/canvas",
                    "PYTHONPATH": os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")])),
                },
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is for this process
            )
        self._guard.watch(process.pid)
        return process

    async def _drain(self, process: asyncio.subprocess.Process) -> None:
        """Send SIGTERM to the daemon, and once more for every further signal; wait for its end."""
        typer.secho("  Stopping: runs that have begun end first. Ctrl-C again to hand them back.", dim=True)
        sent = 0
        deadline = asyncio.get_running_loop().time() + DRAIN_TIMEOUT
        while process.returncode is None and asyncio.get_running_loop().time() < deadline:
            while sent < self._signals:
                sent += 1
                process.terminate()
            try:
                async with asyncio.timeout(0.1):
                    await process.wait()
            except TimeoutError:
                continue

    def _explain_end(self, code: int | None) -> NoReturn:
        lines = self._home.daemon_log.read_text(errors="replace").strip().splitlines() or ["It said nothing."]
        raise ImageJobsError(
            f"The daemon ended by itself, with code {code}.", f"{lines[-1]}\nIts log is {self._home.daemon_log}."
        )

    async def _welcome(self, connection: Connection) -> None:
        """Print the first screen; on a fresh database, insert the first run."""
        here = await available(self._settings.model_copy(update={"demo": True}))
        keys = [f"{setting(name)} adds {name}" for name in PROVIDERS if name not in here]
        bucket = self._settings.bucket
        private = await connection.fetchval("select not b.public from storage.buckets b where b.id = $1", bucket)
        blocks = [
            ("Canvas", f"{self._url}/canvas", "<- open this"),
            ("Dashboard", f"{self._url}{PREFIX}#{self._token}", ""),
            ("Postgres", self._dsn, f"{self._server.version}, data in {self._home.directory}/"),
            ("API", self._url, "Auth, REST, Realtime, Storage"),
            ("Providers", ", ".join(here), ", ".join(keys)),
            *([("Pictures", "private", "open for members of their workflow alone")] if private else []),
            ("Your app", f"cp {shlex.quote(str(self._home.environment))} .env.local", "Vite, Next.js: URL and key"),
            ("Environment", str(self._home.environment), "the same, DATABASE_URL and the service key"),
            ("Daemon's log", str(self._home.daemon_log), ""),
        ]
        typer.echo()
        for label, value, remark in blocks:
            line = f"  {label:<13} {typer.style(f'{value:<52}', bold=True)} {typer.style(remark, dim=True)}"
            typer.echo(line if remark else f"  {label:<13} {typer.style(value, bold=True)}")
        typer.echo('\n  In another terminal: image-jobs generate "a lighthouse at dusk"')
        if self._settings.database_url is not None:
            typer.secho("  DATABASE_URL is set here: commands follow it, not this dev, until it is unset.", fg="yellow")
        if self._realtime_limit is not None:
            typer.secho(
                f"  Realtime drops what goes beyond {self._realtime_limit} messages a second over a minute.",
                fg="yellow",
            )
        typer.secho("  Ctrl-C stops everything and keeps the data.\n", dim=True)
        if not await connection.fetchval("select exists (select from public.runs)"):
            await create_first_workflow(connection)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:  # the terminal is closed: writing to it would be an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):
                os.dup2(nowhere, stream.fileno())
        self._signals += 1
        self._stopping.set()


def frontend_environment(values: Mapping[str, str]) -> dict[str, str]:
    """Return the address and the public key under the names that templates of Vite and Next.js read."""
    key = values["SUPABASE_ANON_KEY"]
    public = {"SUPABASE_URL": values["SUPABASE_URL"], "SUPABASE_PUBLISHABLE_KEY": key, "SUPABASE_ANON_KEY": key}
    return {f"{prefix}{name}": value for prefix in FRONTENDS for name, value in public.items()}


def _start_postgres(home: Home) -> Server:
    """Start the database on last time's port, or on another one if that is taken. `env` has it."""
    ports = (home.remembered_port(), _any_port(), _any_port())
    for port in ports:
        server = Server(embedded_bin_dir(), home.database, port)
        try:
            server.start()
        except ImageJobsError:
            if is_free(port):
                raise  # it was not the port
        else:
            return server
    taken = f"{', '.join(map(str, ports[:-1]))} and {ports[-1]}"
    raise ImageJobsError(
        f"The database found no port: other programs took {taken} meanwhile.",
        "Start image-jobs dev again: it tries others.",
    )


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
