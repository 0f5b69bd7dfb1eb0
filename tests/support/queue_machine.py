"""The queue as a state machine: a database beside its model, clients that insert, and what holds after every step."""

import asyncio
from uuid import UUID

import asyncpg
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.run_model import ASKED, DAEMONS, FALLBACK, LEASE, NODES, TERMINAL, WORKFLOWS, Daemon, Run


class QueueMachine(RuleBasedStateMachine):
    """A database and its model: one connection, two daemons, two workflows with two nodes each."""

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
        # The same steps have to lead to the same state, or Hypothesis takes what it draws for flaky.
        self.execute("select setseed(0)")
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

    # What holds after every step.

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
