"""`image-jobs dev`: starts everything on one machine, in order, and stops it in reverse.

Postgres and the daemon are processes of their own, the stand-in for Supabase's endpoints lives in this one. The daemon
gets nothing that a deployed one would not get: an address and a key in its environment.
"""

import asyncio
import os
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
from daemon.dev.api import listen, one_port, serving
from daemon.dev.canvas import canvas_app, found_first_workflow
from daemon.dev.feed import Feed
from daemon.dev.guard import Guard
from daemon.dev.home import Home
from daemon.dev.keys import load_keys
from daemon.dev.postgres import Server, embedded_bin_dir
from daemon.dev.realtime import realtime_app
from daemon.dev.rest import rest_app
from daemon.dev.storage import storage_app
from daemon.errors import ImageJobsError
from daemon.migrate import migrate
from daemon.providers import PROVIDERS, available, setting
from daemon.settings import Settings

WHERE_COMMANDS_LOOK = Path(".image-jobs")
"""Without DATABASE_URL, commands take what the `env` in there says."""

DAEMON_DEFAULTS = {"IMAGE_JOBS_LEASE": "10", "IMAGE_JOBS_DRAIN_TIMEOUT": "30"}
"""Somebody is waiting in front of the terminal."""

LEAVE_TIMEOUT = 60.0
"""Seconds for the daemon to leave after it was told to, before it is killed."""


def start(*, data: Path, port: int, fresh: bool, settings: Settings) -> None:
    """Runs everything until Ctrl-C, SIGTERM or SIGHUP; keeps the data.

    Args:
        data: Where everything is kept.
        port: Of the Supabase endpoints.
        fresh: Delete what is kept first.
        settings: For the bucket, and to tell which providers join.

    Raises:
        ImageJobsError: If something is in the way, or a part ends by itself.
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
            asyncio.run(Stack(home, server, listening, guard, settings).run())
    except KeyboardInterrupt:
        return


class Stack:
    """What runs once Postgres does."""

    def __init__(self, home: Home, server: Server, listening: socket.socket, guard: Guard, settings: Settings) -> None:
        self._home = home
        self._server = server
        self._listening = listening
        self._guard = guard
        self._settings = settings
        self._dsn = server.dsn(user="postgres")
        self._url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._signals = 0
        self._told = asyncio.Event()

    async def run(self) -> None:
        """Returns when told to stop and everything but Postgres has ended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        async with connected(self._server.dsn()) as superuser:
            await superuser.execute(Path(__file__).with_name("supabase.sql").read_text())
        await migrate(self._dsn, bucket=self._settings.bucket)
        keys = load_keys(self._home.directory)
        environment = {
            "DATABASE_URL": self._dsn,
            "SUPABASE_URL": self._url,
            "SUPABASE_ANON_KEY": keys.anon_key,
            "SUPABASE_SERVICE_ROLE_KEY": keys.service_role_key,
        }
        as_gateway = self._server.dsn(user="authenticator")
        async with (
            asyncpg.create_pool(self._dsn, min_size=0) as pool,
            asyncpg.create_pool(as_gateway, min_size=0) as rest,
            realtime_app(self._dsn, pool, keys) as realtime,
        ):
            apps = {
                "/storage/v1": storage_app(pool, self._home.storage, keys),
                "/rest/v1": rest_app(rest, keys),
                "/realtime/v1": realtime,
                "/canvas": canvas_app(keys),
            }
            async with serving(one_port(apps), self._listening), connected(self._dsn) as connection:
                await self._work(connection, environment)

    async def _work(self, connection: Connection, environment: Mapping[str, str]) -> None:
        """Runs the daemon, and prints what it does, until it is told to leave."""
        feed = Feed(connection)
        await feed.look()
        since = await connection.fetchval("select private.now()")
        process = await self._start_daemon(environment)
        parts = {
            asyncio.create_task(self._watch(connection, feed, environment, since), name="watch"),
            asyncio.create_task(process.wait(), name="daemon"),
            asyncio.create_task(self._told.wait(), name="signals"),
        }
        try:
            ended, others = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for each in ended:
                await each  # watching never ends by itself: it says what broke
            if not self._told.is_set():
                self._explain_end(process.returncode)
            await self._leave(process)
            for each in others:
                each.cancel()
            await asyncio.wait(parts)
            await feed.look()
        finally:
            for each in parts:
                each.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _watch(self, connection: Connection, feed: Feed, environment: Mapping[str, str], since: datetime) -> None:
        """From the moment that everything is up, the daemon as the last; one that was killed may still look alive."""
        ready = "select exists (select from public.daemons where state = 'alive' and started_at >= $1)"
        while not await connection.fetchval(ready, since):  # noqa: ASYNC110 - another process sets it
            await asyncio.sleep(0.05)
        self._home.write_environment(environment)
        await self._welcome(connection)
        await feed.run()

    async def _start_daemon(self, environment: Mapping[str, str]) -> asyncio.subprocess.Process:
        package = Path(daemon.__file__).parents[1]
        with self._home.daemon_log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "daemon", "run"),  # -P: whatever is called daemon here is not ours
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
                start_new_session=True,  # the terminal's Ctrl-C is for us
            )
        self._guard.watch(process.pid)
        return process

    async def _leave(self, process: asyncio.subprocess.Process) -> None:
        """Tells the daemon to leave, and once more for every further signal."""
        typer.secho("  Stopping: runs that have begun end first. Ctrl-C again to hand them back.", dim=True)
        asked = 0
        deadline = asyncio.get_running_loop().time() + LEAVE_TIMEOUT
        while process.returncode is None and asyncio.get_running_loop().time() < deadline:
            while asked < self._signals:
                asked += 1
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 0.1)
            except TimeoutError:
                continue

    def _explain_end(self, code: int | None) -> NoReturn:
        lines = self._home.daemon_log.read_text(errors="replace").strip().splitlines() or ["It said nothing."]
        raise ImageJobsError(
            f"The daemon ended by itself, with code {code}.", f"{lines[-1]}\nIts log is {self._home.daemon_log}."
        )

    async def _welcome(self, connection: Connection) -> None:
        """The first screen; and on a fresh database the first run."""
        here = await available(self._settings.model_copy(update={"demo": True}))
        keys = [f"{setting(name)} adds {name}" for name in PROVIDERS if name not in here]
        prefix = "" if self._home.directory == WHERE_COMMANDS_LOOK else f"env $(cat {self._home.environment}) "
        blocks = [
            ("Canvas", f"{self._url}/canvas", "<- open this"),
            ("Postgres", self._dsn, f"{self._server.version}, data in {self._home.directory}/"),
            ("API", self._url, "REST, Realtime, Storage"),
            ("Providers", ", ".join(here), ", ".join(keys)),
            ("Environment", str(self._home.environment), "DATABASE_URL and keys, for your application"),
            ("Daemon's log", str(self._home.daemon_log), ""),
        ]
        typer.echo()
        for label, value, remark in blocks:
            said = f"  {label:<13} {typer.style(f'{value:<52}', bold=True)} {typer.style(remark, dim=True)}"
            typer.echo(said if remark else f"  {label:<13} {typer.style(value, bold=True)}")
        typer.echo(f'\n  In another terminal: {prefix}image-jobs generate "a lighthouse at dusk"')
        typer.secho("  Ctrl-C stops everything and keeps the data.\n", dim=True)
        if not await connection.fetchval("select exists (select from public.runs)"):
            await found_first_workflow(connection)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:  # the terminal is gone: writing to it would be an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):
                os.dup2(nowhere, stream.fileno())
        self._signals += 1
        self._told.set()


def _start_postgres(home: Home) -> Server:
    """Starts the database on last time's port, or on another if somebody has that. `env` says which."""
    for port in (home.remembered_port(), _any_port(), _any_port()):
        server = Server(embedded_bin_dir(), home.database, port)
        try:
            server.start()
        except ImageJobsError:
            if _is_free(port):
                raise  # it was not the port
        else:
            return server
    raise ImageJobsError("No port for the database could be had.", "Try again.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
