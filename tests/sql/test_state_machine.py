"""Any sequence of operations on runs: the database and a model of it in Python agree after every step."""

import asyncio
import os
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support.postgres import DEFAULT, Cluster, connect

pytestmark = pytest.mark.every_postgres

WORKFLOWS = (UUID(int=1), UUID(int=2))
NODES = ("left", "right")
DAEMONS = 2
TERMINAL = ("completed", "failed", "cancelled")
LEASE = 30
HOUR = 3600
# Not a divisor of anything that the database waits for, so that a step never ends where a wait does.
STRIDE = 1007

EXAMPLES = int(os.environ.get("IMAGE_JOBS_TEST_EXAMPLES", "60"))
"""By hand a few hundred. The other versions get a quarter."""

ASKED = "demo:painter"
FALLBACK = ("demo:second", "demo:third")

AGAIN = {"outcome": "retry", "payload": {"error": "Again.", "code": "unavailable"}}
OUTCOMES: tuple[dict[str, object], ...] = (
    {"outcome": "completed", "payload": {"imageUrl": "https://example.com/x.png"}},
    {"outcome": "failed", "payload": {"error": "It failed.", "code": "refused"}},
    {"outcome": "failed", "payload": {"error": "It is gone.", "code": "model_retired"}, "fall_back": True},
    {"outcome": "failed", "payload": {"error": "It took too long.", "code": "polling_timeout"}},
    AGAIN | {"due_in": 0},
    AGAIN | {"due_in": 500},
    AGAIN | {"due_in": 0, "refund": True},
    AGAIN | {"due_in": 500, "refund": True, "fall_back": True},
    AGAIN | {"due_in": 0, "refund": True, "refund_for": 300},
    {"outcome": "parked", "due_in": 0},
    {"outcome": "parked", "due_in": 500},
    {"outcome": "released"},
)


@dataclass
class Run:
    """The model of a run. `state` says held or parked where the database says running."""

    workflow: UUID
    node: str | None
    claim: int
    ticket: int
    state: str = "pending"
    holder: UUID | None = None
    attempt: int = 0
    max_attempts: int = 3
    job: str | None = None
    code: str | None = None
    refused_since: float | None = None
    unheld: bool = False
    call: int = 0
    steps: tuple[str, ...] = ()
    step: int = 0

    @property
    def routed_to(self) -> str | None:
        """Return the step that it was rerouted to."""
        return self.steps[self.step - 1] if self.step else None

    @property
    def status(self) -> str:
        return "running" if self.state in ("held", "parked") else self.state

    def again(self, claim: int, ticket: int) -> None:
        """Requeue, as an outside writer does by setting it to pending."""
        if self.state != "failed" or self.code != "polling_timeout":
            self.job = None
        if self.job is None:
            self.step = 0
        self.state, self.claim, self.ticket = "pending", claim, ticket
        self.holder, self.attempt, self.code, self.refused_since, self.unheld = None, 0, None, None, False


@dataclass
class Daemon:
    """A daemon, and the runs it believes to hold: {claim: run}."""

    id: UUID = field(default_factory=uuid4)
    held: dict[int, str] = field(default_factory=dict)


def some_daemon_holds(queue: "Queue") -> bool:
    return any(daemon.held for daemon in queue.daemons)


class Queue(RuleBasedStateMachine):
    """One connection, two daemons, two workflows with two nodes each."""

    runner: asyncio.Runner
    connection: "asyncpg.Connection[asyncpg.Record]"

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, Run] = {}
        self.daemons: list[Daemon] = []
        self.settled: list[tuple[Daemon, dict[str, object]]] = []
        self.last_claim = 0
        self.ledger: dict[int, str] = {}
        self.call_of: dict[int, int] = {}
        self.clock = 0.0
        self.paused = False

    def execute(self, query: str, *args: object) -> str:
        return self.runner.run(self.connection.execute(query, *args))

    def fetch(self, query: str, *args: object) -> "list[asyncpg.Record]":
        return self.runner.run(self.connection.fetch(query, *args))

    @initialize()
    def begin(self) -> None:
        self.execute(
            "truncate runs, run_events, workflow_nodes, image_jobs.stale_nodes, image_jobs.daemons, image_jobs.workflows, "
            "image_jobs.calls, image_jobs.cancellations, image_jobs.claimants, image_jobs.due_marks; "
            "delete from image_jobs.watermarks; delete from image_jobs.provider_limits where provider = 'demo'; "
            "insert into image_jobs.provider_limits (provider) values ('demo')"
        )
        self.last_claim = self.fetch("select nextval('image_jobs.claims')")[0][0]
        self.move_clock(0)
        self.daemons = [self.new_daemon() for _ in range(DAEMONS)]
        for number in range(4):
            self.insert(WORKFLOWS[number % 2], NODES[0], 0)

    def new_daemon(self) -> Daemon:
        daemon = Daemon()
        self.execute(
            "select image_jobs.register_daemon($1, 'd', '0', 9, make_interval(secs => $2), '{demo}')", daemon.id, LEASE
        )
        return daemon

    def move_clock(self, seconds: float) -> None:
        self.clock += seconds
        self.execute("select set_config('image_jobs.clock_offset', $1, false)", f"{self.clock} s")

    def sync(self, daemon: Daemon, slots: int = 0, **parts: object) -> "list[asyncpg.Record]":
        return self.fetch(
            "select part, run from image_jobs.sync($1, $2, true, $3, $4, $5, null)",
            daemon.id,
            slots,
            parts.get("settlements", []),
            parts.get("progress", []),
            parts.get("held"),
        )

    def new_claim(self, claim: int) -> int:
        assert claim > self.last_claim, "a claim was used before"
        self.last_claim = claim
        return claim

    def some_run(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.runs)), label="run")

    def outside(self, query: str, run: str) -> None:
        """Set the status to pending from outside: read the new claim and ticket into the model."""
        self.lose_call(self.runs[run])
        self.execute(query, run)
        row = self.fetch("select claim, ticket from runs where id = $1", run)[0]
        assert row["ticket"] > max(each.ticket for each in self.runs.values())
        self.runs[run].again(self.new_claim(row["claim"]), row["ticket"])

    # The ledger: what each request that left, or may have left, has become.

    def book(self, call: int, state: str) -> None:
        """Write down what became of a call: exact replaces unknown, nothing replaces exact."""
        was = self.ledger.get(call)
        if was == "open" or (was == "unknown" and state in ("charged", "free")):
            self.ledger[call] = state

    def lose_call(self, model: Run) -> None:
        """Note that a run is taken away from its holder. A provider job is cancelled, and its call open until then."""
        if model.state == "held" and model.job is None:
            self.book(model.call, "unknown")

    def book_settlement(self, settlement: dict[str, object], model: Run, known: bool) -> None:
        """Write down what a settlement says, or what follows from its outcome; `known`: its claim is the run's."""
        if "calls" in settlement:
            (call,) = settlement["calls"]
            self.book(call["id"], call["state"])
            return
        check = known and model.job is not None
        if not (settlement["outcome"] == "released" and check):
            call = model.call if check else settlement["claim"]
            free = settlement.get("refund") or settlement["outcome"] == "released"
            state = {"completed": "charged", "parked": "open"}.get(settlement["outcome"], "free" if free else "unknown")
            self.book(call, state)

    @precondition(lambda self: self.fetch("select from image_jobs.cancellations limit 1"))
    @rule(data=st.data(), said=st.sampled_from(({"state": "free"}, {"state": "charged", "cost": 0.01}, None)))
    def finish_a_cancellation(self, data: st.DataObject, said: dict[str, object] | None) -> None:
        rows = self.fetch("select provider_job_id, call from image_jobs.cancellations order by 2")
        job, call = data.draw(st.sampled_from([tuple(row) for row in rows]), label="cancellation")
        self.execute("select image_jobs.finish_cancellation('demo', $1, null, false, $2)", job, said)
        self.book(call, str(said["state"]) if said else "unknown")

    @rule()
    def sweep(self) -> None:
        self.execute("select image_jobs.sweep_calls()")

    # The client and the canvas.

    @rule(
        workflow=st.sampled_from(WORKFLOWS),
        node=st.sampled_from((None, *NODES)),
        delay=st.sampled_from((0, 500)),
        steps=st.integers(0, len(FALLBACK)),
    )
    def insert(self, workflow: UUID, node: str | None, delay: int, steps: int = len(FALLBACK)) -> None:
        run = f"run-{len(self.runs)}"
        metadata = {"promptSpec": {"basePrompt": "a red fox"}, **({"nodeId": f"{workflow}-{node}"} if node else {})}
        metadata |= {"fallback": list(FALLBACK[:steps])} if steps else {}
        (row,) = self.fetch(
            "insert into runs (id, kind, subject_id, status, processor, metadata, due_at) "
            "values ($1, 'image_gen', $2, 'pending', $5, $3, image_jobs.now() + make_interval(secs => $4)) "
            "returning claim, ticket",
            run,
            workflow,
            metadata,
            delay,
            ASKED,
        )
        self.runs[run] = Run(
            workflow, metadata.get("nodeId"), self.new_claim(row["claim"]), row["ticket"], steps=FALLBACK[:steps]
        )

    @rule(workflow=st.sampled_from(WORKFLOWS), node=st.sampled_from(NODES), x=st.integers(0, 9))
    def drag_node(self, workflow: UUID, node: str, x: int) -> None:
        self.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image', $3) "
            "on conflict (id) do update set node_data = excluded.node_data",
            f"{workflow}-{node}",
            workflow,
            {"x": x, "status": "completed", "imageUrl": "https://example.com/forged.png"},
        )

    # The daemon.

    @rule(data=st.data(), slots=st.integers(1, 3))
    def claim(self, data: st.DataObject, slots: int) -> None:
        self.take(data, slots, heard=True)

    @rule(data=st.data())
    def claim_and_lose_the_reply(self, data: st.DataObject) -> None:
        self.take(data, slots=3, heard=False)

    def take(self, data: st.DataObject, slots: int, heard: bool) -> None:
        if self.paused:
            self.pause_or_go_on()
        daemon = data.draw(st.sampled_from(self.daemons), label="daemon")
        before = self.claimable()
        claimed = {row["run"]["id"]: row["run"] for row in self.sync(daemon, slots)}
        assert len(claimed) <= slots
        assert set(claimed) <= self.claimable(claimed)
        if not set(claimed) >= before:
            assert len(claimed) == slots
        for run in sorted(claimed, key=lambda run: claimed[run]["claim"]):
            model = self.runs[run]
            if model.state == "pending":
                model.attempt += 1
            if model.job is None:
                model.call = claimed[run]["claim"]
                self.ledger[model.call] = "open"
            self.call_of[claimed[run]["claim"]] = model.call
            assert claimed[run]["call"] == model.call
            assert claimed[run]["attempt"] == model.attempt
            assert claimed[run]["processor"] == (model.routed_to or ASKED)
            assert claimed[run]["provider_job_id"] == model.job
            model.state, model.holder, model.claim = "held", daemon.id, self.new_claim(claimed[run]["claim"])
            if heard:
                daemon.held[model.claim] = run

    def claimable(self, among: "dict[str, object] | None" = None) -> set[str]:
        """Return runs that a daemon may claim now; of those `among`, the ones it might have claimed a moment ago."""
        due = {row[0] for row in self.fetch("select id from runs where due_at <= image_jobs.now()")} | set(among or ())
        return {
            run
            for run, model in self.runs.items()
            if run in due and (model.state == "parked" or (model.state == "pending" and not self.paused))
        }

    @precondition(some_daemon_holds)
    @rule(data=st.data(), outcome=st.sampled_from(OUTCOMES))
    def finish(self, data: st.DataObject, outcome: dict[str, object]) -> None:
        self.settle(data, outcome)

    @rule(data=st.data(), outcome=st.sampled_from(OUTCOMES))
    def work(self, data: st.DataObject, outcome: dict[str, object]) -> None:
        self.take(data, slots=1, heard=True)
        if some_daemon_holds(self):
            self.settle(data, outcome)

    def settle(self, data: st.DataObject, outcome: dict[str, object]) -> None:
        daemon = data.draw(st.sampled_from([each for each in self.daemons if each.held]), label="daemon")
        stale = {claim for claim, run in daemon.held.items() if self.runs[run].claim != claim}
        claim = data.draw(st.sampled_from(sorted(stale or daemon.held)), label="claim")
        run = daemon.held.pop(claim)
        settlement = {"provider_job_id": f"job-{claim}"} if outcome["outcome"] == "parked" else {}
        settlement |= outcome | {"id": run, "claim": claim}
        settlement["if_lost"] = {"payload": {"event": "late", "data": {"claim": claim}}}
        said = data.draw(st.sampled_from((None, None, "charged", "unknown", "free")), label="said of the call")
        if said is not None and outcome["outcome"] not in ("parked", "released"):
            settlement["calls"] = [{"id": self.call_of[claim], "state": said}]
        self.settled.append((daemon, settlement))
        ((_, result),) = self.sync(daemon, settlements=[settlement])
        model = self.runs[run]
        self.book_settlement(settlement, model, model.claim == claim)
        if (model.state, model.claim, model.holder) != ("held", claim, daemon.id):
            assert result["result"] == "lost"
            return
        assert result["result"] == "settled"
        self.end_attempt(model, settlement)

    def end_attempt(self, model: Run, settlement: dict[str, object]) -> None:
        model.holder = None
        refused_since, model.refused_since = model.refused_since, None
        match settlement["outcome"]:
            case "failed" | "retry" if settlement.get("fall_back") and model.step < len(model.steps):
                model.state, model.job, model.attempt, model.step = "pending", None, 0, model.step + 1
            case "parked":
                model.state, model.job = "parked", str(settlement["provider_job_id"])
            case "released":
                model.state = "parked" if model.job else "pending"
                model.attempt -= 0 if model.job else 1
            case "retry":
                model.job = None
                since = self.clock if refused_since is None else refused_since
                refunded = bool(settlement.get("refund")) and since > self.clock - settlement.get("refund_for", HOUR)
                model.refused_since = since if settlement.get("refund") else None
                model.state = "pending" if refunded or model.attempt < model.max_attempts else "failed"
                model.attempt -= 1 if refunded else 0
            case outcome:
                model.state = str(outcome)
        if model.state == "failed":
            payload = settlement["payload"]
            assert isinstance(payload, dict)
            model.code = payload["code"]

    @precondition(lambda self: self.settled)
    @rule(data=st.data())
    def settle_again(self, data: st.DataObject) -> None:
        daemon, settlement = data.draw(st.sampled_from(self.settled), label="settlement")
        ((_, result),) = self.sync(daemon, settlements=[settlement])
        model = self.runs[str(settlement["id"])]
        claim = model.claim
        self.book_settlement(settlement, model, claim == settlement["claim"])
        assert result["result"] == ("already" if claim == settlement["claim"] else "lost")

    @precondition(some_daemon_holds)
    @rule(data=st.data(), progress=st.integers(0, 100))
    def record_progress(self, data: st.DataObject, progress: int) -> None:
        daemon = data.draw(st.sampled_from([each for each in self.daemons if each.held]), label="daemon")
        claim = data.draw(st.sampled_from(sorted(daemon.held)), label="claim")
        run = daemon.held[claim]
        ((_, result),) = self.sync(daemon, progress=[{"id": run, "claim": claim, "progress": progress}])
        held = self.runs[run].state == "held" and self.runs[run].claim == claim
        assert result["result"] == ("recorded" if held else "lost")

    @precondition(lambda self: self.claims_unheard())
    @rule(data=st.data())
    def reconcile(self, data: st.DataObject) -> None:
        """Release a claim whose reply was lost."""
        daemon = data.draw(st.sampled_from(self.daemons), label="daemon")
        self.sync(daemon, held=list(daemon.held))
        for model in self.runs.values():
            if model.state == "held" and model.holder == daemon.id and model.claim not in daemon.held:
                model.holder = None
                if model.job:
                    model.state = "parked"
                    continue
                spent = model.unheld or self.ledger[model.call] != "open"
                self.book(model.call, "unknown" if spent else "free")
                model.unheld = True
                model.state = "failed" if spent and model.attempt >= model.max_attempts else "pending"
                model.code = "outcome_unknown" if model.state == "failed" else None
                model.attempt -= 0 if spent else 1

    def claims_unheard(self) -> bool:
        believed = {claim for daemon in self.daemons for claim in daemon.held}
        return any(run.state == "held" and run.claim not in believed for run in self.runs.values())

    @precondition(lambda self: any(run.holder for run in self.runs.values()))
    @rule(data=st.data())
    def take_over(self, data: st.DataObject) -> None:
        """Let all but one beat for a lease and a bit; then one of them takes over."""
        silent = data.draw(st.sampled_from(self.daemons), label="silent")
        alive = [daemon for daemon in self.daemons if daemon is not silent]
        for _ in range(5):
            for daemon in alive:
                self.execute("select image_jobs.heartbeat($1, 0, false, false)", daemon.id)
            self.move_clock(LEASE / 3)
        theirs = [run for run in sorted(self.runs) if self.runs[run].holder == silent.id]
        assert self.fetch("select image_jobs.take_over($1)", alive[0].id)[0][0] == len(theirs)
        claims = {
            row["id"]: row["claim"] for row in self.fetch("select id, claim from runs where id = any ($1)", theirs)
        }
        for run in sorted(theirs, key=claims.__getitem__):
            model = self.runs[run]
            self.lose_call(model)
            model.claim, model.holder = self.new_claim(claims[run]), None
            if model.job:
                model.state = "parked"
            elif model.attempt < model.max_attempts:
                model.state = "pending"
            else:
                model.state, model.code = "failed", "outcome_unknown"
        self.daemons[self.daemons.index(silent)] = self.new_daemon()

    # Operators.

    @precondition(lambda self: self.runs)
    @rule(
        data=st.data(),
        way=st.sampled_from(("select cancel_run($1)", "update runs set status = 'cancelled' where id = $1")),
    )
    def cancel(self, data: st.DataObject, way: str) -> None:
        run = self.some_run(data)
        model = self.runs[run]
        try:
            self.execute(way, run)
        except asyncpg.InvalidParameterValueError:
            assert model.state in TERMINAL
            assert way.startswith("update")
            return
        if model.state in TERMINAL:
            assert way.startswith("select")
        else:
            self.lose_call(model)
            model.state, model.holder = "cancelled", None
            model.claim = self.new_claim(self.fetch("select claim from runs where id = $1", run)[0][0])

    @precondition(lambda self: self.runs)
    @rule(
        data=st.data(),
        way=st.sampled_from(("select requeue_run($1)", "update runs set status = 'pending' where id = $1")),
    )
    def requeue(self, data: st.DataObject, way: str) -> None:
        self.outside(way, self.some_run(data))

    @precondition(lambda self: self.runs)
    @rule(
        data=st.data(),
        change=st.sampled_from(
            (
                "priority = 5",
                "priority = null",
                "due_at = null",
                "due_at = '-infinity'",
                "due_at = image_jobs.now() + interval '500 s'",
                "claim = 1, ticket = 1, attempt = 99, claimed_by = gen_random_uuid(), routed_to = 'demo:forged'",
                "call = 1, unheld = true, source_workflow = subject_id, queue_state = 'pending'",
                "queued_at = null, requeued_by = subject_id",
                "lane = 'nowhere', rank = -5, created_at = null, refused_since = null, webhook = 'came'",
                "metadata = metadata || '{\"note\": 1}'",
            )
        ),
    )
    def update_another_column(self, data: st.DataObject, change: str) -> None:
        self.execute(f"update runs set {change} where id = $1", self.some_run(data))

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), attempts=st.integers(1, 4))
    def change_max_attempts(self, data: st.DataObject, attempts: int) -> None:
        run = self.some_run(data)
        attempts = max(attempts, self.runs[run].attempt + 1)
        self.execute("update runs set max_attempts = $2 where id = $1", run, attempts)
        self.runs[run].max_attempts = attempts

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), status=st.sampled_from(("running", "completed", "failed", "nonsense")))
    def set_an_impossible_status(self, data: st.DataObject, status: str) -> None:
        run = self.some_run(data)
        if self.runs[run].status == status:
            return
        try:
            self.execute("update runs set status = $2 where id = $1", run, status)
        except asyncpg.InvalidParameterValueError:
            return
        raise AssertionError(f"a run was set to {status} by hand")

    @rule()
    def pause_or_go_on(self) -> None:
        self.paused = not self.paused
        self.execute("update image_jobs.provider_limits set paused = $1 where provider = 'demo'", self.paused)

    @rule(strides=st.sampled_from((1, 4)))
    def time_passes(self, strides: int) -> None:
        self.move_clock(strides * STRIDE)

    # What always holds.

    @invariant()
    def the_database_agrees_with_the_model(self) -> None:
        rows = self.fetch(
            "select id, status, claim, ticket, claimed_by, attempt, max_attempts, provider_job_id, routed_to, "
            "finished_at is not null as finished, due_at is not null as due from runs"
        )
        assert {row["id"] for row in rows} == set(self.runs)
        for row in rows:
            run = self.runs[row["id"]]
            assert (row["status"], row["claim"], row["ticket"]) == (run.status, run.claim, run.ticket), row["id"]
            assert (row["claimed_by"], row["provider_job_id"]) == (run.holder, run.job), row["id"]
            assert (row["attempt"], row["max_attempts"]) == (run.attempt, run.max_attempts), row["id"]
            assert row["routed_to"] == run.routed_to, row["id"]
            assert 0 <= row["attempt"] <= row["max_attempts"], row["id"]
            assert row["finished"] == (run.state in TERMINAL), row["id"]
            if run.state in ("pending", "parked"):
                assert row["due"], f"it would never be claimed: {row['id']}"

    @invariant()
    def the_books_agree_with_the_ledger(self) -> None:
        assert dict(tuple(row) for row in self.fetch("select id, state from image_jobs.calls")) == self.ledger

    @invariant()
    def every_node_shows_its_newest_run(self) -> None:
        for row in self.fetch("select id, node_data from workflow_nodes"):
            newest = max(
                ((run.ticket, name) for name, run in self.runs.items() if run.node == row["id"]), default=(0, None)
            )[1]
            shown = row["node_data"]
            assert shown.get("runId") == newest
            status = self.runs[newest].status if newest else None
            assert shown.get("status") == ("error" if status == "failed" else status)
            assert shown.get("imageUrl") != "https://example.com/forged.png"

    @invariant()
    def the_trail_of_events_tells_the_story(self) -> None:
        for row in self.fetch(
            "select run_id, array_agg(payload ->> 'event' order by seq) as events from run_events group by run_id"
        ):
            assert row["events"][0] == "created"
            parts: list[list[str]] = [[]]
            for event in row["events"]:
                if event == "requeued":
                    parts.append([])
                elif event in ("claimed", "retry", "fallback", "parked", "taken_over", *TERMINAL):
                    parts[-1].append(event)
            for part in parts:
                assert not set(part[:-1]) & set(TERMINAL), row["events"]
            run = self.runs[row["run_id"]]
            if run.state in TERMINAL:
                assert parts[-1][-1] == run.state
            assert row["events"].count("created") == 1

    @invariant()
    def a_lost_settlement_is_written_down_once(self) -> None:
        assert not self.fetch(
            "select payload -> 'data' ->> 'claim' from run_events where payload ->> 'event' = 'late' "
            "group by 1 having count(*) > 1"
        )


@pytest.mark.timeout(900)
def test_the_database_agrees_with_the_model_whatever_happens(postgres: Cluster) -> None:
    with asyncio.Runner() as runner:
        database = postgres.database()
        connection = runner.run(connect(runner.run(database.__aenter__())))

        class Here(Queue):
            pass

        Here.runner, Here.connection = runner, connection
        try:
            run_state_machine_as_test(
                Here,
                settings=settings(
                    max_examples=EXAMPLES if postgres.name == DEFAULT else EXAMPLES // 4,
                    stateful_step_count=60,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(connection.close())
            runner.run(database.__aexit__(None, None, None))
