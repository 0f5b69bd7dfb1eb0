"""Sharing: links let users in, for a time and within bounds; leaving ends it at once."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support.postgres import connect, signed_in
from tests.support.protocol import Db, insert_node, move_clock

ANN = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
BOB = UUID("bbbbbbbb-0000-4000-8000-00000000000b")
ANNS = UUID("aaaaaaaa-1111-4000-8000-000000000001")

INSERT_RUN = """
    insert into runs (id, kind, subject_id, status, processor, metadata) values
    ('ann-run', 'image_gen', $1, 'pending', 'demo:painter', '{"nodeId": "ann-node", "promptSpec": {"basePrompt": "x"}}')
"""
REFUSED = asyncpg.InvalidParameterValueError
DENIED = asyncpg.InsufficientPrivilegeError

MEMBERS = "insert into workflow_members (workflow_id, user_id) select $1, gen_random_uuid() from generate_series(1, $2)"
MEMBERSHIPS = (
    "insert into workflow_members (workflow_id, user_id) select gen_random_uuid(), $1 from generate_series(1, $2)"
)


@pytest.fixture
async def db(db: Db) -> Db:
    """Give Ann a workflow with a node and a run."""
    async with signed_in(db, ANN):
        await insert_node(db, "ann-node", ANNS)
        await db.execute(INSERT_RUN, ANNS)
    return db


async def call(db: Db, user: UUID | None, function: str, argument: object, role: str = "authenticated") -> Any:
    """Call one of the functions as a signed-in user."""
    async with signed_in(db, user, role):
        return await db.fetchval(f"select {function}($1)", argument)


async def share(db: Db, user: UUID = ANN, workflow: UUID = ANNS) -> str:
    """Make a link. Returns its token."""
    return await call(db, user, "share_workflow", workflow)


async def members(db: Db, workflow: UUID = ANNS) -> set[UUID]:
    """Fetch a workflow's members."""
    return {row[0] for row in await db.fetch("select user_id from workflow_members where workflow_id = $1", workflow)}


async def refusal(db: Db, user: UUID | None, function: str, argument: object) -> tuple[str, str]:
    """Call a function that refuses. Returns the SQLSTATE and the sentence; there is a hint, too."""
    with pytest.raises(asyncpg.PostgresError) as refused:
        await call(db, user, function, argument)
    assert refused.value.hint
    return refused.value.sqlstate, str(refused.value.message)


NO_LINK = ("PT404", "This link does not open a workflow: it has expired, or was revoked.")
NO_WORKFLOW = ("PT404", "There is no such workflow.")


async def test_a_link_makes_its_opener_a_member_at_once(db: Db) -> None:
    token = await share(db)
    async with signed_in(db, BOB):
        await db.execute("select set_config('realtime.topic', $1, true)", f"workflow:{ANNS}")
        assert await db.fetchval("select count(*) from realtime.messages") == 0
        assert await db.fetchval("select join_workflow($1)", token) == ANNS
        assert await db.fetchval("select count(*) from realtime.messages") > 0
        assert await db.fetchval("select count(*) from runs") == 1
        assert await db.fetchval("select cancel_run('ann-run') ->> 'status'") == "cancelled"
        await db.execute("delete from workflow_nodes where id = 'ann-node'")
    assert await members(db) == {ANN, BOB}


async def test_leaving_ends_it_at_once(db: Db) -> None:
    await call(db, BOB, "join_workflow", await share(db))
    async with signed_in(db, BOB):
        await db.execute("select set_config('realtime.topic', $1, true)", f"workflow:{ANNS}")
        assert await db.fetchval("select count(*) from realtime.messages") > 0
        await db.execute("select leave_workflow($1)", ANNS)
        assert await db.fetchval("select count(*) from realtime.messages") == 0
        assert await db.fetchval("select count(*) from runs") == 0
    assert await members(db) == {ANN}


async def test_a_link_opens_for_many_and_more_than_once(db: Db) -> None:
    token = await share(db)
    users = [BOB, BOB, uuid4(), ANN]
    assert [await call(db, user, "join_workflow", token) for user in users] == [ANNS] * 4
    assert await members(db) == set(users)


async def test_a_token_is_random_and_kept_as_a_hash_only(db: Db) -> None:
    tokens = {await share(db) for _ in range(5)}
    assert len(tokens) == 5
    kept = repr([tuple(row) for row in await db.fetch("select * from image_jobs.workflow_links")])
    for token in tokens:
        assert len(token) == 43 and token.replace("-", "").replace("_", "").isalnum()
        assert token not in kept
        assert await db.fetchval("select sha256(convert_to($1, 'utf8'))::text", token) in str(
            await db.fetch("select token_hash::text from image_jobs.workflow_links")
        )


async def test_a_link_ends_after_seven_days(db: Db) -> None:
    token = await share(db)
    await move_clock(db, "6 days 23:59")
    await call(db, BOB, "join_workflow", token)
    await move_clock(db, "7 days")
    assert await refusal(db, uuid4(), "join_workflow", token) == NO_LINK


@pytest.mark.parametrize("token", [None, "", "x", "a" * 43, "ü" * 10_000])
async def test_an_unknown_token_opens_nothing(db: Db, token: str | None) -> None:
    await share(db)
    assert await refusal(db, BOB, "join_workflow", token) == NO_LINK


async def test_unsharing_revokes_the_links_of_all_members(db: Db) -> None:
    tokens = [await share(db)]
    await call(db, BOB, "join_workflow", tokens[0])
    tokens.append(await share(db, BOB))
    other = uuid4()
    other_link = await share(db, ANN, other)
    await call(db, BOB, "unshare_workflow", ANNS)
    for token in tokens:
        assert await refusal(db, uuid4(), "join_workflow", token) == NO_LINK
    assert await members(db) == {ANN, BOB}
    assert await call(db, BOB, "join_workflow", other_link) == other


async def test_a_link_of_a_former_member_opens_nothing(db: Db) -> None:
    cal = uuid4()
    token = await share(db)
    for user in (BOB, cal):
        await call(db, user, "join_workflow", token)
    bobs, cals = await share(db, BOB), await share(db, cal)
    await call(db, BOB, "leave_workflow", ANNS)
    await db.execute("delete from workflow_members where user_id = $1", cal)
    for user, link in ((BOB, bobs), (uuid4(), bobs), (cal, cals), (uuid4(), cals)):
        assert await refusal(db, user, "join_workflow", link) == NO_LINK
    assert await members(db) == {ANN}


@pytest.mark.parametrize("function", ["share_workflow", "unshare_workflow", "leave_workflow"])
async def test_a_foreign_workflow_is_not_found(db: Db, function: str) -> None:
    token = await share(db)
    assert await refusal(db, BOB, function, ANNS) == NO_WORKFLOW
    assert await call(db, uuid4(), "join_workflow", token) == ANNS
    if function != "share_workflow":
        assert await refusal(db, BOB, function, uuid4()) == NO_WORKFLOW


async def test_sharing_an_unused_workflow_founds_it(db: Db) -> None:
    workflow = uuid4()
    token = await share(db, ANN, workflow)
    assert await call(db, BOB, "join_workflow", token) == workflow
    assert await members(db, workflow) == {ANN, BOB}
    async with signed_in(db, BOB):
        await insert_node(db, "first", workflow)


async def test_members_and_founders_can_open_a_workflow(db: Db) -> None:
    new = uuid4()
    assert [await call(db, user, "can_open_workflow", ANNS) for user in (ANN, BOB)] == [True, False]
    assert [await call(db, user, "can_open_workflow", new) for user in (ANN, BOB)] == [True, True]
    async with signed_in(db, BOB):
        await insert_node(db, "first", new)
    assert [await call(db, user, "can_open_workflow", new) for user in (ANN, BOB)] == [False, True]
    async with signed_in(db, sub="user_2abcDEF"):
        assert await db.fetchval("select can_open_workflow($1)", uuid4()) is False


async def test_adopted_workflows_of_nobody_cannot_be_opened(db: Db) -> None:
    runs, nodes, others = uuid4(), uuid4(), uuid4()
    await db.execute(INSERT_RUN.replace("ann-", "old-"), runs)
    await insert_node(db, "old", nodes)
    await db.execute("insert into runs (id, kind, subject_id, status) values ('r', 'research', $1, 'pending')", others)
    # As rows that were there before us: nothing has noted their workflows.
    await db.execute("delete from image_jobs.workflows where id = any ($1::uuid[])", [runs, nodes, others])
    assert [await call(db, BOB, "can_open_workflow", it) for it in (runs, nodes, others)] == [False, False, True]


async def test_sharing_no_workflow_is_refused(db: Db) -> None:
    assert await refusal(db, ANN, "share_workflow", None) == ("22023", "workflow_id is missing.")


async def test_the_last_member_cannot_leave(db: Db) -> None:
    state, sentence = await refusal(db, ANN, "leave_workflow", ANNS)
    assert (state, sentence) == ("22023", "You are the last member of this workflow, and the last one cannot leave.")
    await call(db, BOB, "join_workflow", await share(db))
    await call(db, ANN, "leave_workflow", ANNS)
    assert (await refusal(db, BOB, "leave_workflow", ANNS))[0] == "22023"
    assert await members(db) == {BOB}


async def test_a_workflow_has_a_hundred_members_at_most(db: Db) -> None:
    await db.execute(MEMBERS, ANNS, 98)
    token = await share(db)
    await call(db, BOB, "join_workflow", token)
    assert await refusal(db, uuid4(), "join_workflow", token) == (
        "22023",
        "This workflow has 100 members, and more are not possible.",
    )
    assert await call(db, BOB, "join_workflow", token) == ANNS
    await call(db, BOB, "leave_workflow", ANNS)
    assert await call(db, uuid4(), "join_workflow", token) == ANNS


async def test_a_user_is_a_member_of_a_thousand_at_most(db: Db) -> None:
    await db.execute(MEMBERSHIPS, BOB, 999)
    token = await share(db)
    await call(db, BOB, "join_workflow", token)
    full = ("22023", "You are a member of 1,000 workflows, and more are not possible.")
    other = await share(db, ANN, uuid4())
    assert await refusal(db, BOB, "join_workflow", other) == full
    assert await refusal(db, BOB, "share_workflow", uuid4()) == full
    with pytest.raises(REFUSED, match="1,000 workflows"):
        async with signed_in(db, BOB):
            await insert_node(db, "one-too-many", uuid4())
    await call(db, BOB, "leave_workflow", ANNS)
    async with signed_in(db, BOB):
        await insert_node(db, "fits", uuid4())


async def test_a_workflow_has_a_hundred_open_links_at_most(db: Db) -> None:
    token, *_ = [await share(db) for _ in range(100)]
    state, sentence = await refusal(db, ANN, "share_workflow", ANNS)
    assert (state, sentence) == ("22023", "This workflow has 100 open links, and more are not possible.")
    assert await call(db, BOB, "join_workflow", token) == ANNS
    await move_clock(db, "7 days")
    await share(db)
    assert await db.fetchval("select count(*) from image_jobs.workflow_links") == 1


async def race(database: str, first: tuple[UUID, str, object], second: tuple[UUID, str, object]) -> Any:
    """Make two calls, the second while the first is not committed. Returns the second's result, or error."""
    one, two = await connect(database), await connect(database)
    try:
        async with signed_in(one, first[0]):
            await one.fetchval(f"select {first[1]}($1)", first[2])
            pid = two.get_server_pid()
            later = asyncio.create_task(call(two, *second))
            while not await one.fetchval("select cardinality(pg_blocking_pids($1)) > 0", pid):
                assert not later.done()
        (result,) = await asyncio.gather(later, return_exceptions=True)
        return result
    finally:
        await one.close()
        await two.close()


async def test_of_two_who_join_at_once_the_last_place_takes_one(database: str, db: Db) -> None:
    await db.execute(MEMBERS, ANNS, 98)
    token = await share(db)
    error = await race(database, (BOB, "join_workflow", token), (uuid4(), "join_workflow", token))
    assert isinstance(error, REFUSED) and "100 members" in str(error)
    assert len(await members(db)) == 100


async def test_of_the_last_two_who_leave_at_once_one_stays(database: str, db: Db) -> None:
    await call(db, BOB, "join_workflow", await share(db))
    error = await race(database, (BOB, "leave_workflow", ANNS), (ANN, "leave_workflow", ANNS))
    assert isinstance(error, REFUSED) and "last member" in str(error)
    assert await members(db) == {ANN}


async def test_a_users_last_place_is_taken_once(database: str, db: Db) -> None:
    await db.execute(MEMBERSHIPS, BOB, 999)
    tokens = [await share(db), await share(db, ANN, uuid4())]
    error = await race(database, (BOB, "join_workflow", tokens[0]), (BOB, "join_workflow", tokens[1]))
    assert isinstance(error, REFUSED) and "1,000 workflows" in str(error)
    assert await db.fetchval("select count(*) from workflow_members where user_id = $1", BOB) == 1000


async def test_a_link_that_is_just_being_revoked_opens_nothing(database: str, db: Db) -> None:
    token = await share(db)
    error = await race(database, (ANN, "unshare_workflow", ANNS), (BOB, "join_workflow", token))
    assert isinstance(error, asyncpg.PostgresError) and error.sqlstate == "PT404"
    assert await members(db) == {ANN}


async def test_an_older_snapshot_counts_no_members(database: str, db: Db) -> None:
    await call(db, BOB, "join_workflow", await share(db))
    other = await connect(database)
    async with other.transaction(isolation="repeatable_read"):
        await other.fetchval("select count(*) from workflow_members")
        await call(db, BOB, "leave_workflow", ANNS)
        with pytest.raises(asyncpg.SerializationError):
            await call(other, ANN, "leave_workflow", ANNS)
    await other.close()
    assert await members(db) == {ANN}


@pytest.mark.one_postgres
@pytest.mark.parametrize("function", ["public.share_workflow", "public.unshare_workflow", "image_jobs.forget_user"])
async def test_operators_have_to_name_whom_they_mean(db: Db, function: str) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError) as refused:
        await db.fetchval(f"select {function}(null)")
    assert refused.value.hint


@pytest.mark.parametrize("function", ["share_workflow", "unshare_workflow", "leave_workflow", "join_workflow"])
async def test_callers_without_a_user_id_are_refused(db: Db, function: str) -> None:
    argument = await share(db) if function == "join_workflow" else ANNS
    with pytest.raises(DENIED, match="permission denied for function"):
        await call(db, None, function, argument, role="anon")
    with pytest.raises(DENIED, match="its claim sub is not a uuid") as refused:
        async with signed_in(db, sub="user_2abcDEF"):
            await db.fetchval(f"select {function}($1)", argument)
    assert refused.value.hint
    assert await members(db) == {ANN}


async def test_an_operator_makes_and_revokes_links(db: Db) -> None:
    token = await call(db, None, "share_workflow", ANNS, role="service_role")
    assert await call(db, BOB, "join_workflow", token) == ANNS
    await call(db, None, "unshare_workflow", ANNS, role="service_role")
    assert await refusal(db, uuid4(), "join_workflow", token) == NO_LINK
    for function, argument in (("join_workflow", token), ("leave_workflow", ANNS)):
        with pytest.raises(DENIED, match="names no user"):
            await call(db, None, function, argument, role="service_role")


async def test_a_rule_of_the_application_makes_links_void(db: Db) -> None:
    token = await share(db)
    await db.execute(
        f"""
        create or replace function image_jobs.my_workflows() returns setof uuid
        language sql volatile security definer set search_path = ''
        as $$ select '{ANNS}'::uuid where image_jobs.current_user_id() = '{ANN}' $$
        """
    )
    sentence = "Links do not decide who may see this workflow: the application has a rule of its own."
    assert await refusal(db, BOB, "join_workflow", token) == ("22023", sentence)
    for function in ("share_workflow", "unshare_workflow", "leave_workflow"):
        await db.execute("delete from workflow_members")
        assert await refusal(db, ANN, function, ANNS) == ("22023", sentence)
    assert await members(db) == set()
