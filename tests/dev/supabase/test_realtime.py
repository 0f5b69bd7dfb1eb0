"""The Realtime stand-in by frames: broadcasts, tokens, changes, refusals, restarts."""

import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
import websockets

from daemon.dev.supabase.realtime import changes
from daemon.dev.supabase.realtime.limits import RateLimit
from tests.support.postgres import Cluster, wait_until
from tests.support.realtime_project import Project, running

LABELLED = {"id": "n1", "label": "fox"}


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator[Project]:
    async with running(postgres) as one:
        yield one


@pytest.mark.parametrize("private", [True, False])
async def test_clients_broadcast_in_both_protocol_versions(project: Project, private: bool) -> None:
    await project.db.execute(
        """create policy read on realtime.messages for select to authenticated using (realtime.topic() = 'talk');
        create policy write on realtime.messages for insert to authenticated
        with check (realtime.topic() = 'talk' and auth.uid() is not null and auth.jwt() ? 'speaks')"""
    )
    speaker, silent = project.token(speaks=True), project.token()
    async with project.wire("1.0.0") as one, project.wire("2.0.0") as two:
        echo = {"self": True, "ack": True}
        await one.join("realtime:talk", "1", token=speaker, private=private, broadcast=echo)
        await two.join("realtime:talk", "1", token=silent, private=private)
        payload = {"type": "broadcast", "event": "hi", "payload": {"n": 1}}
        await one.send("realtime:talk", "broadcast", payload, ref="2", join_ref="1")
        assert await two.next() == [[None, None, "realtime:talk", "broadcast", payload]]
        own, reply = await one.next(2)
        assert (own["payload"], reply["payload"]["status"]) == (payload, "ok")
        push = bytes([3, 1, 1, 13, 2, 0, 1]) + b"13realtime:talkho" + b'{"n": 2}'
        await two.socket.send(push)
        received = [frame["payload"] for frame in await one.silence()]
        if private:
            assert received == []  # no policy lets that user speak
        else:
            assert received == [{"type": "broadcast", "event": "ho", "payload": {"n": 2}}]
        assert await two.silence() == []


async def test_a_message_reaches_only_its_own_topic_and_privacy(project: Project) -> None:
    async with project.wire("2.0.0") as wire:
        await wire.join("realtime:talk", "1", token=project.token())
        await wire.join("realtime:other", "2", token=project.token())
        for private in (True, False):
            await project.db.execute("select realtime.send('{}', 'e', 'talk', $1)", private)
        (frame,) = await wire.next()
        assert frame["binary"]["topic"] == "realtime:talk"
        assert await wire.silence() == []


async def test_a_name_too_long_for_a_binary_frame_comes_as_text(project: Project) -> None:
    long = "x" * 300
    async with project.wire("2.0.0") as wire:
        await wire.join(f"realtime:{long}", "1")
        await project.db.execute("select realtime.send('{}', 'e', $1, false)", long)
        (frame,) = await wire.next()
        assert frame[2:4] == [f"realtime:{long}", "broadcast"]


async def test_rolled_back_messages_are_not_sent(project: Project) -> None:
    async with project.wire("2.0.0") as wire:
        await wire.join("realtime:talk", "1")
        transaction = project.db.transaction()
        await transaction.start()
        await project.db.execute("select realtime.send('{}', 'undone', 'talk', false)")
        await transaction.rollback()
        await project.db.execute("select realtime.send('{}', 'done', 'talk', false)")
        (frame,) = await wire.next()
        assert frame["binary"]["event"] == "done"


async def test_an_invalid_new_token_ends_the_channel(project: Project) -> None:
    async with project.wire("1.0.0") as wire:
        await wire.join("realtime:talk", "1", token=project.token())
        await wire.send("realtime:talk", "access_token", {"access_token": "garbage"})
        system, closed = await wire.next(2)
        assert system["payload"]["message"] == "MalformedJWT: The token provided is not a valid JWT"
        assert (closed["event"], closed["ref"]) == ("phx_close", "1")


async def test_a_channel_ends_with_its_token(project: Project) -> None:
    async with project.wire("1.0.0") as wire:
        soon = project.token(exp=int(time.time()) + 2)
        await wire.join("realtime:talk", "1", token=soon)
        system, closed = await wire.next(2)
        assert system["payload"]["message"] == "InvalidJWTToken: Token has expired 0 seconds ago"
        assert closed["event"] == "phx_close"


async def test_changes_are_sent_by_filter_and_permission(project: Project) -> None:
    await project.db.execute(
        """create table public.things (id integer primary key, size integer, secret text, owner uuid);
        alter table public.things enable row level security;
        create policy own on public.things for select to authenticated using (owner = auth.uid());
        grant select (id, size, owner) on public.things to authenticated;
        alter publication supabase_realtime add table public.things"""
    )
    user = str(uuid4())
    filters = ["size=gt.5", "size=in.(1,7)", "id=eq.3"]
    asked = [{"event": "*", "schema": "public", "table": "things", "filter": each} for each in filters]
    async with project.wire("1.0.0") as wire:
        (joined, _) = await wire.join("realtime:t", "1", token=project.token(user), postgres_changes=asked, replies=2)
        ids = [each["id"] for each in joined["payload"]["response"]["postgres_changes"]]
        for number, size, owner in ((1, 1, user), (2, 9, user), (3, 4, user), (4, 4, user), (5, 9, str(uuid4()))):
            await project.db.execute("insert into things values ($1, $2, 'hidden', $3)", number, size, owner)
        # Deleted only after the other changes were sent: a row that no longer exists when it is looked up is sent to no client.
        frames = [frame["payload"] for frame in await wire.next(3)]
        await project.db.execute("delete from things where id in (2, 3)")
        frames += [frame["payload"] for frame in await wire.next()]
        assert [frame["ids"] for frame in frames] == [[ids[1]], [ids[0]], [ids[2]], [ids[2]]]
        assert frames[0]["data"]["record"] == {"id": 1, "size": 1, "owner": user}
        assert [column["name"] for column in frames[0]["data"]["columns"]] == ["id", "size", "owner"]
        assert (frames[3]["data"]["type"], frames[3]["data"]["old_record"]) == ("DELETE", {"id": 3})


@pytest.mark.parametrize(
    ("topic", "config", "reason"),
    [
        ("realtime:t", {"presence": {"enabled": True}}, "image-jobs dev does not have presence."),
        (
            "realtime:t",
            {"postgres_changes": [{"filter": "id=like.x"}]},
            "image-jobs dev does not have the filter id=like.x.",
        ),
        (
            "realtime:t",
            {"postgres_changes": [{"select": ["id"]}]},
            "image-jobs dev does not have a selection of columns.",
        ),
        ("t", {}, "TopicNameRequired: You must provide a topic name"),
    ],
)
async def test_missing_features_are_refused_by_name(project: Project, topic: str, config: Any, reason: str) -> None:
    async with project.wire("1.0.0") as wire:
        (reply,) = await wire.join(topic, "1", **config)
        assert reply["payload"]["status"] == "error"
        assert reply["payload"]["response"]["reason"].endswith(reason)


async def test_a_filter_of_another_type_is_refused(project: Project) -> None:
    asked = {
        "event": "*",
        "schema": "public",
        "table": "workflow_nodes",
        "filter": "workflow_id=eq.x'; drop table runs",
    }
    async with project.wire("1.0.0") as wire:
        _, system = await wire.join("realtime:t", "1", postgres_changes=[asked], replies=2)
        assert system["payload"]["status"] == "error"
        assert "invalid input syntax for type uuid" in system["payload"]["message"]


async def test_garbage_frames_disturb_no_channel(project: Project) -> None:
    async with project.wire("1.0.0") as one, project.wire("2.0.0") as two:
        for garbage in (
            "",
            "[]",
            "{}",
            "null",
            "[" * 50_000,
            b"\x03",
            b"\x03" + b"\xff" * 9,
            '{"topic": 1, "event": 2}',
        ):
            await one.socket.send(garbage)
            await two.socket.send(garbage)
        for strange in (5, [], {"broadcast": 5, "presence": "x", "postgres_changes": {"a": 1}}):
            await one.send("realtime:x", "phx_join", {"config": strange}, ref="4", join_ref="4")
        assert {frame["event"] for frame in await one.silence()} == {"phx_reply", "phx_close"}
        replay = {"config": {"private": True, "broadcast": {"replay": {"since": "x"}}}}
        await one.send(
            "realtime:x", "phx_join", {**replay, "access_token": project.token(role="service_role")}, ref="4"
        )
        (reply,) = await one.next()
        assert reply["payload"]["response"] == {"reason": "UnableToReplayMessages: Replay params are not valid"}
        await one.send("realtime:nowhere", "broadcast", {"event": "e", "payload": {}}, ref="5")
        (reply,) = await one.next()
        assert reply["payload"] == {"status": "error", "response": {"reason": "unmatched topic"}}
        assert await one.silence() == await two.silence() == []


async def test_clients_notice_a_restart_of_the_server(postgres: Cluster) -> None:
    async with running(postgres) as project:
        socket = await websockets.connect(project.websocket(apikey=project.keys.anon_key, vsn="2.0.0"))
    with pytest.raises(websockets.ConnectionClosed) as caught:
        await socket.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1012


async def test_an_exception_in_the_block_is_raised_unwrapped(postgres: Cluster) -> None:
    with pytest.raises(ZeroDivisionError):
        async with running(postgres):
            raise ZeroDivisionError


async def test_other_paths_and_versions_return_501(project: Project) -> None:
    async with httpx.AsyncClient() as http:
        reply = await http.get(f"{project.url}/realtime/v1/api/tenants")
    assert reply.status_code == 501
    with pytest.raises(websockets.InvalidStatus) as caught:
        await websockets.connect(project.websocket(apikey=project.keys.anon_key, vsn="3.0.0"))
    assert caught.value.response.status_code == 501


async def test_a_heartbeats_reply_names_no_join(project: Project) -> None:
    async with project.wire("2.0.0") as wire:
        await wire.send("phoenix", "heartbeat", {}, ref="7", join_ref="1")
        assert await wire.next() == [[None, "7", "phoenix", "phx_reply", {"status": "ok", "response": {}}]]


async def test_changes_are_read_without_a_pause_after_a_batch(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    await project.db.execute(
        "create table public.lines (id integer primary key); grant select on public.lines to authenticated;"
        "alter publication supabase_realtime add table public.lines"
    )
    asked = [{"event": "INSERT", "schema": "public", "table": "lines"}]
    monkeypatch.setattr(changes, "INTERVAL", 2)
    async with project.wire("2.0.0") as wire:
        await wire.join("realtime:t", "1", token=project.token(), postgres_changes=asked, replies=2)
        await project.db.execute(
            "do $$ begin for i in 1..90 loop insert into lines values (i); commit; end loop; end $$"
        )
        monkeypatch.setattr(changes, "INTERVAL", 3600)  # the next pause would be for ever
        frames = await wire.next(90)
    assert [frame[4]["data"]["record"]["id"] for frame in frames] == list(range(1, 91))


async def test_beyond_the_limit_clients_hear_nothing(postgres: Cluster) -> None:
    async with running(postgres, messages_per_second=1) as project, project.wire("2.0.0") as wire:
        await wire.join("realtime:talk", "1")
        message = {"topic": "talk", "event": "e", "payload": {}}
        headers = {"apikey": project.keys.anon_key}
        async with httpx.AsyncClient(timeout=20, headers=headers) as http:
            url = f"{project.url}/realtime/v1/api/broadcast"
            assert (await http.post(url, json={"messages": [message] * 61})).status_code == 202
        frames = await wire.silence()
        assert len(frames) == 60
        # Of the changes of tables, too: the second is read only after the first was sent, or dropped.
        asked = [{"event": "*", "schema": "public", "table": "workflow_nodes"}]
        await wire.join("realtime:t", "2", token=project.token(role="service_role"), postgres_changes=asked, replies=2)
        for name in ("n1", "n2"):
            read = await project.db.fetchval(
                "with made as (insert into workflow_nodes (id, workflow_id, node_type, node_data) "
                "values ($1, gen_random_uuid(), 'image', '{}') returning id) select pg_current_wal_lsn()::text from made",
                name,
            )
            await wait_until(lambda read=read: _read_up_to(project, read))
        assert await wire.silence() == []


async def _read_up_to(project: Project, lsn: str) -> bool:
    """Whether the slot of postgres_changes has been read beyond a place in the log."""
    query = """select bool_and(confirmed_flush_lsn > $1::text::pg_lsn) from pg_replication_slots
    where slot_name like 'realtime_%' and database = current_database()"""
    return bool(await project.db.fetchval(query, lsn))


def test_the_limit_is_an_average_over_a_minute() -> None:
    now = 1000.0
    limit = RateLimit(2, lambda: now)
    assert [limit.admits() for _ in range(121)] == [True] * 120 + [False]
    now += 59
    assert not limit.admits()
    now += 1
    assert [limit.admits() for _ in range(121)] == [True] * 120 + [False]
    assert not RateLimit(0).admits()
    assert all(RateLimit(None).admits() for _ in range(1000))
