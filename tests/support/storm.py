"""A storm over several daemons: kills, frosts, restarts, cut and swallowed connections, cancels and requeues at random.

What happens next is drawn from one seed, so that a storm can be sent again; when exactly it hits a run, no seed decides.
"""

import asyncio
import os
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import asyncpg

from daemon.dev.postgres import Server
from tests.support.daemons import Daemon
from tests.support.fault_harness import FaultHarness
from tests.support.paid_api import PaidAPI
from tests.support.postgres import wait_until
from tests.support.proxies import Proxy, proxied

DAEMONS, SLOTS = 3, 4
LEASE, RUN_TIMEOUT = 2, 6
STARTS = 120
"""Seconds for the first daemons, which start at once, on a machine that has other work."""
MOST_IN_LINE = 30
BACKGROUND = 0.25
"""Of the runs are parked while the provider draws."""
STEPS = {
    "insert": 12,
    "cancel": 8,
    "requeue": 8,
    "kill": 3,
    "leave": 2,
    "freeze": 3,
    "cut": 4,
    "swallow": 2,
    "refuse": 2,
    "restart": 1,
    "close_storage": 2,
    "cut_uploads": 3,
    "hold_uploads": 1,
}
"""Events that may happen next, and how likely."""


@dataclass(eq=False)
class Post:
    """A daemon, the network between it and the database, and the directory for its pictures, which a successor inherits."""

    daemon: Daemon
    network: Proxy
    tmp_dir: Path
    frozen: bool = False
    leaving: bool = False
    partitioned: bool = False


@dataclass
class Storm:
    """Daemons on a project, and what befalls them."""

    harness: FaultHarness
    api: PaidAPI
    server: Server
    random: Random
    stack: AsyncExitStack
    posts: list[Post] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    exits: list[tuple[str, int]] = field(default_factory=list)
    """How daemons were ended, and their exit codes."""

    async def sql(self, query: str, *arguments: object) -> "list[asyncpg.Record]":
        """Run one statement, again until the database is there and lets it through."""
        while True:
            try:
                return await self.harness.db.fetch(query, *arguments)
            except (
                OSError,
                asyncpg.InterfaceError,
                asyncpg.PostgresConnectionError,
                asyncpg.OperatorInterventionError,
            ):
                await asyncio.sleep(0.2)
                if self.harness.db.is_closed():
                    await self._reconnect()
            except (asyncpg.DeadlockDetectedError, asyncpg.CannotConnectNowError):
                pass

    async def _reconnect(self) -> None:
        with suppress(OSError, asyncpg.PostgresError):
            await self.harness.reconnect()

    async def add_daemon(self, tmp_dir: Path) -> Post:
        """Start a daemon, behind a proxy of its own."""
        network = await self.stack.enter_async_context(proxied(self.harness.project.dsn))
        environment = {
            "OPENAI_BASE_URL": self.api.url,
            "IMAGE_JOBS_CONCURRENCY": str(SLOTS),
            "IMAGE_JOBS_LEASE": str(LEASE),
            "IMAGE_JOBS_RUN_TIMEOUT": str(RUN_TIMEOUT),
            "IMAGE_JOBS_DRAIN_TIMEOUT": "4",
            "IMAGE_JOBS_POLL_INTERVAL": "1",
            "IMAGE_JOBS_POLL_TIMEOUT": "20",
            "IMAGE_JOBS_TMP_DIR": str(tmp_dir),
        }
        daemon = await self.stack.enter_async_context(self.harness.run_daemon(dsn=network.dsn, **environment))
        post = Post(daemon, network, tmp_dir)
        self.posts.append(post)
        return post

    async def rage(self, seconds: float) -> None:
        """Let things happen for that long, one after the other, and wait until the last one is over."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        await self.insert()
        async with asyncio.TaskGroup() as group:
            while loop.time() < end:
                (name,) = self.random.choices([*STEPS], [*STEPS.values()])
                lasting: Coroutine[Any, Any, None] | None = await getattr(self, name)()
                self.counts[name] += 1
                if lasting is not None:
                    group.create_task(lasting, name=name)
                await asyncio.sleep(self.random.uniform(0.1, 0.7))

    async def calm_down(self, timeout: float) -> None:
        """Draw every picture from now on, and make what waits due until every run has ended."""
        self.api.calm, self.harness.gate.cuts = True, 0

        async def over() -> bool:
            await self.sql("delete from image_jobs.provider_blocks")
            await self.sql(
                "update runs set due_at = now() where status = 'pending' and due_at > now() + interval '1 s'"
            )
            return not await self.sql("select from runs where finished_at is null limit 1")

        try:
            await wait_until(over, timeout=timeout)
        except AssertionError:
            rows = await self.sql("select * from runs where finished_at is null")
            lines = "\n".join(line for post in self.posts for line in post.daemon.raw[-20:])
            raise AssertionError(f"{len(rows)} runs do not end: {[dict(row) for row in rows[:3]]}\n{lines}") from None

    # Steps. Each draws all that it needs at once, and returns what lasts longer.

    async def insert(self) -> None:
        """Insert some runs, unless there are many in line."""
        many = self.random.randint(2, 7)
        (line,) = await self.sql("select count(*)::int as length from runs where finished_at is null")
        if line["length"] >= MOST_IN_LINE:
            return
        for _ in range(many):
            await self.insert_one()

    async def insert_one(self) -> None:
        """Insert a run of one of three workflows."""
        run = f"storm-{len(self.runs) + 1}"
        self.runs.append(run)
        await self.sql(
            """insert into runs (id, kind, subject_id, status, processor, metadata)
            values ($1, 'image_gen', $2, 'pending', $3, $4) on conflict do nothing""",
            run,
            UUID(int=self.random.randint(1, 3)),
            self.harness.processor,
            {
                "promptSpec": {"basePrompt": f"Run {run} in a storm"},
                **({"mode": "background"} if self.random.random() < BACKGROUND else {}),
            },
        )

    async def cancel(self) -> None:
        """Cancel a run that has not ended."""
        unfinished = await self.sql("select id from runs where finished_at is null order by ticket")
        if unfinished:
            run = self.random.choice(unfinished)["id"]
            await self.sql("update runs set status = 'cancelled' where id = $1 and finished_at is null", run)

    async def requeue(self) -> None:
        """Requeue a run, in whatever state."""
        await self.sql("update runs set status = 'pending' where id = $1", self.random.choice(self.runs))

    async def kill(self) -> Coroutine[Any, Any, None] | None:
        """Kill a daemon, frozen or not; another one starts a while later."""
        living = [post for post in self.posts if not post.leaving]
        if len(living) < DAEMONS:
            return None
        return self._end(self.random.choice(living), signal.SIGKILL, self.random.uniform(0, 2))

    async def leave(self) -> Coroutine[Any, Any, None] | None:
        """Tell a daemon to leave, perhaps twice."""
        living = self._awake()
        if len(living) < DAEMONS:
            return None
        post, patience = self.random.choice(living), self.random.choice((None, 0.5))
        return self._end(post, signal.SIGTERM, self.random.uniform(0, 2), patience)

    async def freeze(self) -> Coroutine[Any, Any, None] | None:
        """Freeze a daemon, mostly for longer than its lease."""
        living = self._awake()
        if len(living) < 2:
            return None
        post = self.random.choice(living)
        post.frozen = True
        post.daemon.signal(signal.SIGSTOP)
        return self._thaw(post, self.random.uniform(0.5 * LEASE, 3 * LEASE))

    async def cut(self) -> None:
        """Cut the connections of a daemon to the database."""
        await self.random.choice(self.posts).network.cut()

    async def swallow(self) -> Coroutine[Any, Any, None] | None:
        """Deliver nothing between a daemon and the database for a while."""
        post, seconds = self.random.choice(self.posts), self.random.uniform(0.5, 2.5 * LEASE)
        return None if post.partitioned else self._partition(post, post.network.swallowing(), seconds)

    async def refuse(self) -> Coroutine[Any, Any, None] | None:
        """Refuse a daemon's connections to the database for a while."""
        post, seconds = self.random.choice(self.posts), self.random.uniform(0.5, 2.5 * LEASE)
        return None if post.partitioned else self._partition(post, post.network.refusing(), seconds)

    async def restart(self) -> None:
        """Restart Postgres, in good order or at once."""
        shutdown, seconds = self.random.choice((signal.SIGINT, signal.SIGQUIT)), self.random.uniform(0, 2)
        assert self.server.pid is not None
        os.kill(self.server.pid, shutdown)
        await wait_until(lambda: self.server.pid is None)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.server.start)

    async def close_storage(self) -> Coroutine[Any, Any, None]:
        """Return 503 from Storage for a while."""
        return self._close_storage(self.random.uniform(0.5, 4))

    async def cut_uploads(self) -> None:
        """Break off the responses to some uploads."""
        self.harness.gate.cuts += self.random.randint(1, 3)

    async def hold_uploads(self) -> Coroutine[Any, Any, None]:
        """Hold uploads for a while, perhaps longer than a lease."""
        return self._hold_uploads(self.random.uniform(0.5, 2 * LEASE))

    def _awake(self) -> list[Post]:
        return [post for post in self.posts if not post.frozen and not post.leaving]

    async def _end(self, post: Post, number: signal.Signals, seconds: float, patience: float | None = None) -> None:
        post.leaving = True
        # Not while Python is importing; and a second signal may meet one that has left already, and is ending.
        obeys = bool(post.daemon.raw) and patience is None
        post.daemon.signal(number)
        if patience is not None:
            await asyncio.sleep(patience)
            if post.daemon.process.returncode is None:
                post.daemon.signal(number)
        code = await post.daemon.ended(timeout=60)
        if obeys:
            self.exits.append((number.name, code))
        self.posts.remove(post)
        await asyncio.sleep(seconds)
        await self.add_daemon(post.tmp_dir)

    async def _thaw(self, post: Post, seconds: float) -> None:
        await asyncio.sleep(seconds)
        post.frozen = False
        if post.daemon.process.returncode is None:
            post.daemon.signal(signal.SIGCONT)

    async def _partition(self, post: Post, outage: AbstractAsyncContextManager[None], seconds: float) -> None:
        post.partitioned = True
        async with outage:
            await asyncio.sleep(seconds)
        post.partitioned = False

    async def _close_storage(self, seconds: float) -> None:
        self.harness.gate.closed = True
        await asyncio.sleep(seconds)
        self.harness.gate.closed = False

    async def _hold_uploads(self, seconds: float) -> None:
        held = self.harness.gate.held.setdefault("POST", asyncio.Event())
        await asyncio.sleep(seconds)
        self.harness.gate.held.pop("POST", None)
        held.set()


@asynccontextmanager
async def storm(harness: FaultHarness, api: PaidAPI, server: Server, random: Random) -> AsyncIterator[Storm]:
    """Start the daemons of a storm."""
    async with AsyncExitStack() as stack:
        await harness.reset_limits()
        it = Storm(harness, api, server, random, stack)
        for _ in range(DAEMONS):
            await it.add_daemon(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="storm-"))))
        for post in it.posts:
            await post.daemon.started(timeout=STARTS)
        yield it
