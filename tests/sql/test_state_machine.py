"""Any sequence of operations on runs: the database and a model of it in Python agree after every step."""

import asyncio
import os

import asyncpg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from tests.support.postgres import DEFAULT, Cluster, connect
from tests.support.queue_machine import QueueMachine
from tests.support.run_model import ASKED, HOUR, LEASE, OUTCOMES, STRIDE, TERMINAL, Run

pytestmark = pytest.mark.every_postgres

EXAMPLES = int(os.environ.get("IMAGE_JOBS_TEST_EXAMPLES", "60"))
"""By hand a few hundred. The other versions get a quarter."""


def some_daemon_holds(queue: "Queue") -> bool:
    return any(daemon.held for daemon in queue.daemons)


class Queue(QueueMachine):
    """The rules: daemons, operators and time change runs."""

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
