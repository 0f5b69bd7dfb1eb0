"""Claims and settlements: the fence, attempts, take-over, and who comes first."""

from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.postgres import connect
from tests.runs import event_names, insert_run, insert_runs, run_row
from tests.sql.protocol import Daemon, Db, events, move_clock, new_daemon, run_in

LATER = {"error": "Later.", "code": "unavailable"}


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    return await new_daemon(db)


# the fence


async def test_a_settlement_that_comes_twice_was_settled_already(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    assert await daemon.complete(claimed) == "settled"
    before = await run_row(db, run), await event_names(db, run)
    assert await daemon.complete(claimed, "https://example.com/other.png") == "already"
    assert (await run_row(db, run), await event_names(db, run)) == before


@pytest.mark.parametrize("outcome", ["retry", "parked", "released"])
async def test_a_run_that_goes_on_was_settled_already_too(db: Db, daemon: Daemon, outcome: str) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    for answer in ("settled", "already"):
        entry = {"payload": LATER} if outcome == "retry" else {}
        assert await daemon.settle(claimed, outcome, due_in=60, **entry) == answer


async def test_requeue_and_reclaim_by_the_same_daemon_leaves_the_old_claim_lost(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    old = await daemon.claim_one()
    await db.execute("update runs set status = 'pending' where id = $1", run)
    new = await daemon.claim_one()
    assert (old["id"], old["attempt"]) == (new["id"], new["attempt"]), "the same pair again"
    assert await daemon.complete(old) == "lost"
    assert await daemon.record(old, progress=90) == "lost"
    assert (await run_row(db, run))["progress"] == 0
    assert await daemon.complete(new) == "settled"


async def test_an_old_and_a_new_claim_in_one_batch_are_told_apart(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    old = await daemon.claim_one()
    await db.execute("update runs set status = 'pending' where id = $1", run)
    new = await daemon.claim_one()
    settlements = [
        {"id": run, "claim": claim["claim"], "outcome": "completed", "payload": {"imageUrl": f"https://{name}.io"}}
        for name, claim in (("old", old), ("new", new))
    ]
    answers = {answer["claim"]: answer["result"] for answer in await daemon.turn(settlements=settlements)}
    assert answers == {old["claim"]: "lost", new["claim"]: "settled"}
    assert (await run_row(db, run))["payload"] == {"imageUrl": "https://new.io"}


async def test_another_daemon_cannot_settle_what_it_does_not_hold(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    other = await new_daemon(db)
    assert await other.complete(claimed) != "settled"
    assert await other.record(claimed, progress=50) == "lost"
    assert (await run_row(db, run))["status"] == "running"
    assert await daemon.complete(claimed) == "settled"


async def test_what_a_lost_claim_cost_is_written_down_once(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("update runs set status = 'cancelled' where id = $1", run)
    late = {"kind": "log", "payload": {"event": "late", "message": "Too late.", "data": {"cost": 0.02}}}
    for _ in range(2):
        assert await daemon.settle(claimed, "completed", payload={"imageUrl": "x"}, if_lost=late) == "lost"
    assert await event_names(db, run) == ["created", "claimed", "cancelled", "late"]
    assert await db.fetchval("select cost from run_costs") is not None


async def test_a_locked_row_is_busy_and_does_not_stall_the_others(database: str, db: Db, daemon: Daemon) -> None:
    locked, free = await insert_runs(db, 2)
    claims = {claimed["id"]: claimed for claimed in await daemon.claim(2)}
    settlements = [
        {"id": run, "claim": claims[run]["claim"], "outcome": "completed", "payload": {"imageUrl": "https://x.io"}}
        for run in (locked, free)
    ]
    progress = [{"id": locked, "claim": claims[locked]["claim"], "progress": 40}]
    somebody = await connect(database)
    try:
        async with somebody.transaction():
            await somebody.execute("select from runs where id = $1 for update", locked)
            await db.execute("set statement_timeout = '5s'")
            answers = await daemon.turn(settlements=settlements, progress=progress)
    finally:
        await somebody.close()
    assert {(answer["part"], answer["id"]): answer["result"] for answer in answers} == {
        ("recorded", locked): "busy",
        ("settled", locked): "busy",
        ("settled", free): "settled",
    }
    assert await daemon.complete(claims[locked]) == "settled"


async def test_an_unknown_outcome_is_refused(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    with pytest.raises(asyncpg.InvalidParameterValueError, match="unknown outcome"):
        await daemon.settle(claimed, "done")


async def test_a_run_does_not_complete_without_an_image_or_fail_without_a_reason(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    with pytest.raises(asyncpg.CheckViolationError, match="runs_image_when_completed"):
        await daemon.settle(claimed, "completed", payload={})
    with pytest.raises(asyncpg.CheckViolationError, match="runs_reason_when_failed"):
        await daemon.settle(claimed, "failed", payload={"code": "refused"})


# attempts


async def test_a_retry_beyond_the_last_attempt_fails_with_the_reason(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    for attempt in (1, 2, 3):
        claimed = await daemon.claim_one()
        assert claimed["attempt"] == attempt
        await daemon.settle(claimed, "retry", payload=LATER, due_in=0)
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["due_at"]) == ("failed", 3, None)
    assert row["payload"] == {**LATER, "attempts": 3}
    assert row["finished_at"] is not None
    assert (await event_names(db, run))[-1] == "failed"


async def test_attempts_come_back_for_at_most_an_hour(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)

    async def refused(minutes: int) -> int:
        await move_clock(db, f"{minutes} min")
        await daemon.settle(await daemon.claim_one(), "retry", payload=LATER, due_in=0, refund=True)
        return (await run_row(db, run))["attempt"]

    assert [await refused(minutes) for minutes in (0, 30, 59)] == [0, 0, 0]
    assert [await refused(minutes) for minutes in (61, 62)] == [1, 2]
    assert await refused(63) == 3
    assert (await run_row(db, run))["status"] == "failed"


async def test_an_accepted_request_begins_a_new_hour(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await daemon.settle(await daemon.claim_one(), "retry", payload=LATER, due_in=0, refund=True)
    await move_clock(db, "50 min")
    await daemon.settle(await daemon.claim_one(), "retry", payload=LATER, due_in=0)
    await move_clock(db, "70 min")
    await daemon.settle(await daemon.claim_one(), "retry", payload=LATER, due_in=0, refund=True)
    assert (await run_row(db, run))["attempt"] == 1


async def test_parking_counts_no_attempt_however_often(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    for minutes in range(5):
        await move_clock(db, f"{minutes} min")
        claimed = await daemon.claim_one()
        assert (
            await daemon.settle(claimed, "parked", provider_job_id="order-1", due_in=5, progress=minutes) == "settled"
        )
    row = await run_row(db, run)
    assert (row["attempt"], row["progress"]) == (1, 4)
    assert (await event_names(db, run)).count("parked") == 1


async def test_a_released_run_gets_its_attempt_back_and_goes_first(db: Db, daemon: Daemon) -> None:
    released, *_ = await insert_runs(db, 5)
    claims = await daemon.claim(3, thorough=False)
    mine = next(claimed for claimed in claims if claimed["id"] == released)
    assert await daemon.settle(mine, "released") == "settled"
    row = await run_row(db, released)
    assert (row["status"], row["attempt"]) == ("pending", 0)
    assert released in {claimed["id"] for claimed in await daemon.claim(2, thorough=False)}


async def test_a_released_order_is_parked_again(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    assert await daemon.settle(await daemon.claim_one(), "released") == "settled"
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["provider_job_id"], row["claimed_by"]) == ("running", 1, "order-1", None)


# a claim whose reply was lost


async def test_claims_that_never_reached_their_daemon_are_given_back(db: Db, daemon: Daemon) -> None:
    ids = await insert_runs(db, 3)
    claims = await daemon.claim(3)
    held, *lost = claims
    await daemon.turn(held=[held["claim"]])
    for run in (claimed["id"] for claimed in lost):
        row = await run_row(db, run)
        assert (row["status"], row["attempt"], row["claimed_by"]) == ("pending", 0, None)
    assert (await run_row(db, held["id"]))["claimed_by"] == daemon.id
    assert {claimed["id"] for claimed in await daemon.claim(3, thorough=False)} == set(ids) - {held["id"]}
    assert await daemon.complete(held) == "settled"


async def test_an_order_whose_claim_was_lost_is_checked_again(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.claim_one()
    await daemon.turn(held=[])
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["claimed_by"]) == ("running", 1, None)
    assert (await daemon.claim_one())["id"] == run


async def test_a_daemon_gives_back_only_what_is_its_own(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await daemon.claim_one()
    other = await new_daemon(db)
    await other.turn(held=[])
    assert (await run_row(db, run))["claimed_by"] == daemon.id


# take-over


async def beat_for(daemon: Daemon, start: int, seconds: int) -> None:
    """Beats every four seconds of the moved clock."""
    for second in (*range(start, start + seconds, 4), start + seconds):
        await move_clock(daemon.connection, f"{second} s")
        await daemon.beat()


async def test_a_silent_daemon_is_taken_over_by_one_that_was_fresh_for_a_lease(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    judge = await new_daemon(db)
    await beat_for(judge, 5, 20)
    assert await judge.take_over() == 0, "not silent for long enough"
    await beat_for(judge, 30, 5)
    assert await judge.take_over() == 1
    row = await run_row(db, run)
    assert (row["status"], row["claimed_by"], row["attempt"]) == ("pending", None, 1)
    assert row["claim"] > claimed["claim"]
    assert await daemon.complete(claimed) == "lost"
    assert (await event_names(db, run))[-1] == "taken_over"
    assert await db.fetchval("select state from daemons where id = $1", daemon.id) == "taken over"


async def test_after_an_outage_nobody_judges_at_once(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    await daemon.claim_one()
    first_back = await new_daemon(db)
    await beat_for(first_back, 5, 60)
    await daemon.beat()
    await move_clock(db, "10 min")
    await first_back.beat()
    assert await first_back.take_over() == 0
    await daemon.beat()
    await beat_for(first_back, 605, 40)
    assert await first_back.take_over() == 1


async def test_a_daemon_that_does_not_beat_itself_judges_nobody(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    await daemon.claim_one()
    sleeper = await new_daemon(db)
    await beat_for(sleeper, 5, 35)
    await move_clock(db, "5 min")
    assert await sleeper.take_over() == 0


async def test_a_fenced_daemon_is_told_by_its_beat_and_by_its_claim(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    await daemon.claim_one()
    judge = await new_daemon(db)
    await beat_for(judge, 5, 40)
    assert await judge.take_over() == 1
    for call in (daemon.beat(), daemon.claim()):
        with pytest.raises(asyncpg.PostgresError) as fenced:
            await call
        assert fenced.value.sqlstate == "IJ002"


async def test_a_session_lock_that_is_free_means_dead_after_six_seconds(database: str, db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    await daemon.claim_one()
    judge = await new_daemon(db, lease="10 s")
    await db.fetchval("select pg_advisory_lock(private.session_lock_key($1))", judge.id)
    listener = await connect(database)
    try:
        await listener.fetchval("select pg_advisory_lock(private.session_lock_key($1))", daemon.id)
        await daemon.beat(session_lock=True)
        await beat_for(judge, 3, 20)
        assert await judge.take_over() == 0, "its session lives"
    finally:
        await listener.close()
    async with db.transaction():  # waits for the lock to be free: the server notices a closed session by itself
        await db.execute("select pg_advisory_xact_lock(private.session_lock_key($1))", daemon.id)
    assert await judge.take_over() == 1


async def test_what_was_parked_is_checked_on_and_not_made_again(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.claim_one()
    judge = await new_daemon(db)
    await beat_for(judge, 10, 45)
    assert await judge.take_over() == 1
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["provider_job_id"]) == ("running", 1, "order-1")
    assert (await judge.claim_one())["provider_job_id"] == "order-1"


async def test_an_unknown_outcome_is_tried_again_as_the_next_attempt_and_no_more(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await db.execute("update runs set max_attempts = 1 where id = $1", run)
    await daemon.claim_one()
    judge = await new_daemon(db)
    await beat_for(judge, 5, 40)
    assert await judge.take_over() == 1
    row = await run_row(db, run)
    assert (row["status"], row["payload"]["code"]) == ("failed", "outcome_unknown")
    taken = next(event for event in await events(db, run) if event["event"] == "taken_over")
    assert "unknown" in taken["message"]


async def test_a_run_that_was_locked_is_taken_over_with_the_next_look(database: str, db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await daemon.claim_one()
    judge = await new_daemon(db)
    await beat_for(judge, 5, 40)
    somebody = await connect(database)
    try:
        async with somebody.transaction():
            await somebody.execute("select from runs where id = $1 for update", run)
            assert await judge.take_over() == 0
    finally:
        await somebody.close()
    assert await judge.take_over() == 1
    assert (await run_row(db, run))["status"] == "pending"


async def test_a_daemon_that_leaves_gives_back_what_it_holds(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await daemon.claim_one()
    await db.execute("select private.leave($1)", daemon.id)
    assert (await run_row(db, run))["claimed_by"] is None
    assert await db.fetchval("select state from daemons") == "stopped"


# who comes first


async def test_ten_thousand_runs_of_one_workflow_do_not_make_another_wait(db: Db, daemon: Daemon) -> None:
    crowd, one = uuid4(), uuid4()
    await insert_runs(db, 10_000, workflow=crowd)
    await daemon.claim(4, thorough=False)
    first = await insert_run(db, workflow=one)
    assert first in {claimed["id"] for claimed in await daemon.claim(4, thorough=False)}


async def test_workflows_take_turns(db: Db, daemon: Daemon) -> None:
    workflows = [uuid4() for _ in range(3)]
    for workflow in workflows:
        await insert_runs(db, 4, workflow=workflow)
    for _ in range(4):
        claims = await daemon.claim(3, thorough=False)
        assert {UUID(claimed["subject_id"]) for claimed in claims} == set(workflows)


async def test_runs_of_one_workflow_come_in_the_order_of_their_insert(db: Db, daemon: Daemon) -> None:
    ids = [await insert_run(db) for _ in range(5)]
    assert [(await daemon.claim(1, thorough=False))[0]["id"] for _ in ids] == ids


async def test_higher_priorities_come_first(db: Db, daemon: Daemon) -> None:
    low, middle, high = await insert_runs(db, 3)
    await db.execute("update runs set priority = case id when $1 then 10 when $2 then 5 else -1 end", high, middle)
    assert [(await daemon.claim())[0]["id"] for _ in range(3)] == [high, middle, low]


async def test_a_delayed_run_is_claimed_when_it_is_due(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await db.execute("update runs set due_at = now() + interval '1 min' where id = $1", run)
    assert await daemon.claim(10) == []
    await move_clock(db, "61 s")
    claimed = await daemon.claim_one()
    assert claimed["id"] == run
    assert claimed["waited"] < 5, "it waits from the time it was due"


async def test_what_commits_late_is_found_by_a_thorough_claim(database: str, db: Db, daemon: Daemon) -> None:
    slow = await connect(database)
    await insert_run(db)
    try:
        async with slow.transaction():
            late = await insert_run(slow, workflow=uuid4())
            for _ in range(5):
                await insert_run(db)
                await daemon.complete((await daemon.claim(1, thorough=False))[0])
            await daemon.claim(5, thorough=False)
    finally:
        await slow.close()
    assert [claimed["id"] for claimed in await daemon.claim(5, thorough=True)] == [late]


async def test_a_full_daemon_claims_nothing(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 3)
    assert await daemon.claim(0) == []
    assert len(await daemon.claim(2)) == 2


async def test_two_daemons_never_claim_the_same_run(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 10)
    other = await new_daemon(db)
    mine, theirs = await daemon.claim(6), await other.claim(6)
    assert len({claimed["id"] for claimed in mine + theirs}) == 10


# providers


async def test_a_run_of_a_provider_that_nobody_knows_is_somebodys_to_refuse(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db, processor="dreams:deep")
    assert (await daemon.claim_one())["id"] == run
    assert await db.fetchval("select count(*) from private.lanes where lane like 'dreams%'") == 0


async def test_a_daemon_without_a_key_leaves_a_provider_to_those_who_have_one(db: Db) -> None:
    run = await insert_run(db, processor="openai:gpt-image-2")
    without, having = await new_daemon(db, "demo"), await new_daemon(db, "openai")
    assert await without.claim(10) == []
    assert (await having.claim_one())["id"] == run


async def test_a_run_that_nobody_has_a_key_for_is_anybodys_to_refuse(db: Db) -> None:
    run = await insert_run(db, processor="openai:gpt-image-2")
    daemon = await new_daemon(db, "demo")
    assert (await daemon.claim_one())["id"] == run


async def test_ten_minutes_without_a_key_holder_are_a_deploy(db: Db) -> None:
    run = await insert_run(db, processor="openai:gpt-image-2")
    having, without = await new_daemon(db, "openai"), await new_daemon(db, "demo")
    await db.execute("select private.leave($1)", having.id)
    await move_clock(db, "9 min")
    assert await without.claim(10) == []
    await move_clock(db, "11 min")
    assert (await without.claim_one())["id"] == run


# progress


async def test_progress_only_grows(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    seen: list[Any] = []
    for progress in (10, 5, 60, None):
        assert await daemon.record(claimed, progress=progress) == "recorded"
        seen.append((await run_row(db, run))["progress"])
    assert seen == [10, 10, 60, 60]


async def test_a_claim_settle_and_progress_go_in_one_turn(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 2)
    first, second = await daemon.claim(2)
    waiting = await insert_run(db)
    answers = await daemon.turn(
        1,
        settlements=[
            {
                "id": first["id"],
                "claim": first["claim"],
                "outcome": "completed",
                "payload": {"imageUrl": "https://x.io"},
            }
        ],
        progress=[{"id": second["id"], "claim": second["claim"], "progress": 30}],
    )
    assert [(answer["part"], answer["id"]) for answer in answers] == [
        ("claimed", waiting),
        ("recorded", second["id"]),
        ("settled", first["id"]),
    ]
