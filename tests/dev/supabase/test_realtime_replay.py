"""The Realtime stand-in responds as the real server did: recorded exchanges are replayed.

The cases build on each other, so they are one test for each version of the protocol and one for HTTP. Ids, times, tokens
and the seconds since a token expired differ each time; everything else must not.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from tests.support.postgres import Cluster, signed_in
from tests.support.realtime_project import USER, Project, Wire, running

CASES = {
    case["case"]: case for case in json.loads(Path(__file__).with_name("realtime_cases.json").read_text())["cases"]
}
REPLAYED: set[str] = set()
PARTS = ("1.0.0", "2.0.0", "handshake", "HTTP", "realtime.send", "load", "fan-out")

WORKFLOW = "dbc58e96-3887-4346-9b98-78d550ba0b17"
OUTSIDE = "ae1dd49b-9bbd-46d4-ac76-35e44c7ee937"
CANVAS, PRIVATE = "realtime:canvas", f"realtime:workflow:{WORKFLOW}"
CHANGES = {"event": "*", "schema": "public", "table": "workflow_nodes", "filter": f"workflow_id=eq.{WORKFLOW}"}

# The table that the server was recorded with.
SCHEMA = f"""
create table public.workflow_nodes (
  id uuid primary key default gen_random_uuid(),
  workflow_id uuid,
  owner uuid default '{USER}',
  status text default 'pending',
  progress integer default 0,
  output jsonb,
  updated_at timestamptz default clock_timestamp()
);
alter table public.workflow_nodes enable row level security;
create policy own on public.workflow_nodes to authenticated using (owner = auth.uid());
grant select, insert on public.workflow_nodes to authenticated;
alter publication supabase_realtime add table public.workflow_nodes;

create function public.tell() returns trigger language plpgsql security definer set search_path = '' as $$
begin
  perform realtime.broadcast_changes('workflow:' || new.workflow_id, tg_op, tg_op, tg_table_name, tg_table_schema, new, old);
  return null;
end $$;
create trigger tell after insert on public.workflow_nodes for each row execute function public.tell();
create policy members on realtime.messages for select to authenticated
using (extension = 'broadcast' and (select realtime.topic()) = 'workflow:{WORKFLOW}');
"""

CHANGING = {
    r'"(ids?)": (?:\[\d+\]|\d+)': r'"\1": 0',
    r"(?!dbc58e96|11111111|ae1dd49b)[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}": "<id>",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z": "<milliseconds>",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?\+00:00": "<time>",
    r"\d+ seconds ago": "<some> seconds ago",
}


def steady(value: Any) -> Any:
    """Replace ids, times and the like, which differ in each run."""
    text = json.dumps(value)
    for pattern, name in CHANGING.items():
        text = re.sub(pattern, name, text)
    return json.loads(text)


def replayed(name: str, field: str = "received") -> Any:
    """Return a recorded value; the case then counts as replayed."""
    REPLAYED.add(name)
    return steady(CASES[name][field])


def complete(part: str) -> bool:
    """Whether all cases of a part were replayed."""
    return all(name in REPLAYED for name in CASES if name.startswith(part))


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator[Project]:
    async with running(postgres, migrated=False) as one:
        await one.db.execute(SCHEMA)
        yield one


async def insert(project: Project, workflow: str = WORKFLOW) -> Any:
    return await project.db.fetchval("insert into workflow_nodes (workflow_id) values ($1) returning id", workflow)


async def update(project: Project, node: Any, changes: str) -> None:
    await project.db.execute(f"update workflow_nodes set {changes} where id = $1", node)


async def record_keys(wire: Wire) -> Any:
    (frame,) = await wire.next()
    payload = frame["payload"] if isinstance(frame, dict) else frame[4]
    return [{"record_keys": sorted(payload["data"]["record"])}]


def random_json(size: int) -> str:
    """Make JSON that does not compress."""
    return (
        f"""(select to_jsonb(string_agg(md5(n::text || random()::text), '')) from generate_series(1, {size // 32}) n)"""
    )


async def replay_changes(project: Project, wire: Wire, version: str) -> None:
    node = await insert(project)
    assert steady(await wire.next()) == replayed(f"{version} INSERT event")
    await update(project, node, "status = 'running'")
    frames = steady(await wire.next())
    if version == "1.0.0":
        assert frames == replayed("1.0.0 UPDATE event")
    await update(project, node, f"output = {random_json(120_000)}")
    await wire.next()
    await update(project, node, "progress = 50")
    toasted = f"{version} UPDATE other column of row with 120 KB TOASTed jsonb (replica identity default)"
    assert await record_keys(wire) == replayed(toasted)
    await update(project, node, f"output = {random_json(1_400_000)}")
    assert steady(await wire.next()) == replayed(f"{version} UPDATE with 1.4 MB jsonb")
    await project.db.execute("delete from workflow_nodes where id = $1", node)
    await insert(project, OUTSIDE)
    other = await insert(project)
    # Neither the deletion nor the other workflow's node comes before it.
    assert str(other) in json.dumps(await wire.next())
    assert replayed(f"{version} DELETE (RLS on, filter on workflow_id, replica identity default)") == []


async def test_version_1_responds_as_recorded(project: Project) -> None:
    token = project.token()
    async with project.wire("1.0.0") as wire:
        await wire.send("phoenix", "heartbeat", {}, ref="1", join_ref="1")
        assert await wire.next() == [replayed("1.0.0 heartbeat")[0]]
        await wire.join(CANVAS, "2", token=token, postgres_changes=[CHANGES], replies=2)
        await replay_changes(project, wire, "1.0.0")
        await wire.send(CANVAS, "phx_leave", {}, ref="3", join_ref="1")
        assert await wire.silence() == replayed("1.0.0 leave")
        await wire.send(CANVAS, "phx_leave", {}, ref="3", join_ref="2")
        assert [frame["event"] for frame in await wire.next(2)] == ["phx_reply", "phx_close"]

        joined = await wire.join(PRIVATE, "4", token=token, private=True)
        assert joined == replayed("1.0.0 join private broadcast topic (authorised)")
        for _ in range(8):
            await insert(project)
        assert {frame["event"] for frame in await wire.next(8)} == {"broadcast"}
        name = "1.0.0 join with replay since 60s ago limit 25"
        since = {"since": int((time.time() - 60) * 1000), "limit": 25}
        received = await wire.join(
            PRIVATE, "7", token=token, private=True, broadcast={"replay": since}, replies=CASES[name]["n"]
        )
        assert steady(received[:3]) == steady(replayed(name, "first"))
        assert await wire.silence() == []

        name = "1.0.0 join private topic without permission"
        assert await wire.join(f"realtime:workflow:{OUTSIDE}", "8", token=token, private=True) == replayed(name)
        assert await wire.join("realtime:x1", "9", token="garbage") == replayed("1.0.0 join with garbage token")
        old = project.token(exp=int(time.time()) - 95445533)
        assert steady(await wire.join("realtime:x2", "10", token=old)) == replayed("1.0.0 join with expired token")
        refused = await wire.join("realtime:x5", "13", broadcast={"replay": since})
        assert refused == replayed("1.0.0 replay on public channel")
    assert complete("1.0.0")


async def test_version_2_responds_as_recorded(project: Project) -> None:
    token = project.token()
    async with project.wire("2.0.0") as wire:
        joined = await wire.join(CANVAS, "2", token=token, postgres_changes=[CHANGES], replies=2)
        assert steady(joined) == replayed("2.0.0 join postgres_changes")
        await replay_changes(project, wire, "2.0.0")
        await wire.send(CANVAS, "phx_leave", {}, ref="3", join_ref="1")
        assert await wire.silence() == replayed("2.0.0 leave")

        joined = await wire.join(PRIVATE, "4", token=token, private=True)
        assert joined == replayed("2.0.0 join private broadcast topic (authorised)")
        await insert(project)
        assert steady(await wire.next(2)) == replayed("2.0.0 broadcast_changes INSERT")
        payload = {"node": "c64e7173-f0ab-4e2e-9c95-f8885fb13095", "progress": 70}
        await project.db.execute("select realtime.send($1, 'node_progress', $2)", payload, f"workflow:{WORKFLOW}")
        assert steady(await wire.next()) == replayed("2.0.0 realtime.send")
        await wire.send(PRIVATE, "access_token", {"access_token": token}, ref="6", join_ref="4")
        assert await wire.silence() == replayed("2.0.0 access_token same token")

        name = "2.0.0 join with replay since 60s ago limit 25"
        since = {"since": int((time.time() - 60) * 1000), "limit": 25}
        await wire.send(PRIVATE, "phx_join", _replaying(token, since), ref="7", join_ref="99")
        assert steady(await wire.next(3)) == steady(replayed(name, "first"))
        await wire.silence()

        await wire.send("realtime:x1", "phx_join", {"access_token": "garbage"}, ref="9", join_ref="101")
        assert await wire.next() == replayed("2.0.0 join with garbage token")
        for topic, ref, join_ref, asked, name in (
            ("realtime:x3", "11", "103", {"table": "nope"}, "on missing table"),
            ("realtime:x4", "12", "104", {"table": "workflow_nodes", "filter": "nocol=eq.1"}, "bad filter column"),
        ):
            config = {"config": {"postgres_changes": [{"event": "*", "schema": "public", **asked}]}}
            await wire.send(topic, "phx_join", config, ref=ref, join_ref=join_ref)
            assert steady(await wire.next(2)) == replayed(f"2.0.0 join postgres_changes {name}")
        public = {"config": {"broadcast": {"replay": since}}}
        await wire.send("realtime:x5", "phx_join", public, ref="13", join_ref="105")
        assert await wire.next() == replayed("2.0.0 replay on public channel")
    assert complete("2.0.0")


def _replaying(token: str, since: dict[str, int]) -> dict[str, Any]:
    return {"config": {"private": True, "broadcast": {"replay": since}}, "access_token": token}


async def test_handshakes_are_refused_as_recorded(project: Project) -> None:
    expired = project.token(exp=1)
    for name, query in (
        ("handshake no apikey", {}),
        ("handshake garbage apikey", {"apikey": "garbage"}),
        ("handshake expired", {"apikey": expired}),
    ):
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(project.websocket(vsn="2.0.0", **query))
        response = caught.value.response
        assert response.status_code == replayed(name, "status")
        assert json.loads(response.body or b"") == json.loads(replayed(name, "body"))
    assert complete("handshake")


async def test_broadcasts_over_http_respond_as_recorded(project: Project) -> None:
    server, anon = ({"apikey": key} for key in (project.keys.service_role_key, project.keys.anon_key))
    message = {"topic": f"workflow:{WORKFLOW}", "event": "e", "payload": {"n": 1}, "private": True}
    single = f"/workflow:{WORKFLOW}/events/e"
    large = {"text": "x" * 4_000_000}
    async with httpx.AsyncClient(timeout=20) as http, project.wire("1.0.0") as wire:
        await wire.join(PRIVATE, "1", token=project.token(), private=True)
        for name, path, body, headers in (
            ("batch private service", "", {"messages": [message]}, server),
            ("single private service", f"{single}?private=true", {"n": 1}, server),
            ("single private anon", f"{single}?private=true", {"n": 1}, anon),
            ("single public anon", single, {"n": 1}, anon),
            ("batch empty", "", {"messages": []}, server),
            ("batch missing event", "", {"messages": [{**message, "event": ""}]}, server),
            ("no key", "", {"messages": [message]}, {}),
            ("single 4MB", f"{single}?private=true", large, server),
            ("batch 4MB", "", {"messages": [{**message, "payload": large}]}, server),
        ):
            response = await http.post(f"{project.url}/realtime/v1/api/broadcast{path}", json=body, headers=headers)
            assert response.status_code == replayed(f"HTTP broadcast {name}", "status"), name
            recorded = replayed(f"HTTP broadcast {name}", "body")
            assert (response.json() if response.content else "") == (json.loads(recorded) if recorded else ""), name
        assert [frame["payload"]["payload"] for frame in await wire.next(2)] == [{"n": 1}] * 2
        assert await wire.silence() == []
    assert complete("HTTP")


async def test_a_user_who_may_not_write_only_gets_a_warning(project: Project) -> None:
    received: list[str] = []
    project.db.add_log_listener(lambda _, notice: received.append(str(notice.message)))
    async with signed_in(project.db, USER):
        await project.db.execute("select realtime.send('{}', 'e', $1)", f"workflow:{WORKFLOW}")
    assert received == replayed("realtime.send as authenticated without insert policy", "notices")


async def test_concurrent_messages_arrive_in_order_at_all_clients(project: Project) -> None:
    token = project.token()
    load = CASES["load broadcast 20/s x100 one subscriber (tenant max_events_per_second 100)"]
    async with project.wire("2.0.0") as one, project.wire("1.0.0") as two:
        for wire in (one, two):
            await wire.join(PRIVATE, "1", token=token, private=True)
            await wire.join(CANVAS, "2", token=token, postgres_changes=[CHANGES], replies=2)
        for number in range(load["sent"]):
            await project.db.execute("select realtime.send($1, 'n', $2)", {"number": number}, f"workflow:{WORKFLOW}")
        spoken = await asyncio.gather(one.next(load["received"]), two.next(load["received"]))
        numbers = [frame["binary"]["payload"]["number"] for frame in spoken[0]]
        assert numbers == list(range(load["sent"])) == [frame["payload"]["payload"]["number"] for frame in spoken[1]]
        await project.db.execute("alter table workflow_nodes disable trigger tell")
        node = await insert(project)
        for number in range(60):
            await update(project, node, f"progress = {number}")
        seen = await asyncio.gather(one.next(61), two.next(61))
        assert [frame[4]["data"]["record"]["progress"] for frame in seen[0][1:]] == list(range(60))
        assert [frame["payload"]["data"]["record"]["progress"] for frame in seen[1][1:]] == list(range(60))
    REPLAYED.add(str(load["case"]))  # as many, not as long


@pytest.mark.parametrize("way", ["postgres_changes", "broadcast"])
async def test_thirty_subscribers_get_every_change(project: Project, way: str) -> None:
    (case,) = (case for name, case in CASES.items() if name.startswith(f"fan-out {way}: 30 subscribers"))
    node = await insert(project)
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(project.wire("1.0.0")) for _ in range(30)]
        for wire in wires:
            if way == "broadcast":
                await wire.join(PRIVATE, "1", token=project.token(), private=True)
            else:
                await wire.join(CANVAS, "1", token=project.token(), postgres_changes=[CHANGES], replies=2)
        await project.db.execute("alter table workflow_nodes disable trigger tell")
        for number in range(60):
            if way == "broadcast":
                await project.db.execute("select realtime.send($1, 'n', $2)", {"n": number}, f"workflow:{WORKFLOW}")
            else:
                await update(project, node, f"progress = {number}")
        received = await asyncio.gather(*(wire.next(60) for wire in wires))
    assert sum(len(frames) for frames in received) == case["expected"] == case["received"]
    REPLAYED.add(str(case["case"]))


def test_every_case_belongs_to_a_test() -> None:
    assert all(name.startswith(PARTS) for name in CASES)
