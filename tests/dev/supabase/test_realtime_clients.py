"""The Realtime stand-in by the official clients: supabase-py and supabase-js get the same results from it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from postgrest import APIError
from realtime import AsyncRealtimeChannel, RealtimeSubscribeStates
from supabase import AsyncClient, AsyncClientOptions, acreate_client

from tests.support.node import run_script
from tests.support.postgres import Cluster
from tests.support.realtime_project import Project, running

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


class Received:
    """Received messages; each can be awaited, before or after it comes."""

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
    states: list[tuple[RealtimeSubscribeStates, Exception | None]] = []
    await channel.subscribe(lambda status, error: states.append((status, error)))
    return states[0][0].value, states[0][1]


async def refusal(query: Any) -> list[str | None]:
    with pytest.raises(APIError) as caught:
        await query.execute()
    return [caught.value.code, caught.value.message]


def shown(status: str) -> Callable[[Any], bool]:
    return lambda row: row["node_data"].get("status") == status


async def converse(project: Project, token: str, outsider_token: str, workflow: str) -> list[Any]:
    """Do the same as conversation.mjs, by supabase-py."""
    results: list[Any] = []
    received = Received()
    async with httpx.AsyncClient(timeout=20) as http:
        client = await signed_in(project, http, token)
        node = {"id": "n1", "workflow_id": workflow, "node_type": "image", "node_data": {"label": "fox"}}
        await client.table("workflow_nodes").insert(node).execute()
        found = await client.table("workflow_nodes").select("id, node_data->>label").eq("id", "n1").single().execute()
        results.append(["node", found.data])

        channel = client.channel(f"workflow:{workflow}", {"config": {"private": True}})  # type: ignore[typeddict-item]
        channel.on_broadcast(
            "nodes_changed", lambda message: [received.add("broadcast", each) for each in message["payload"]["nodes"]]
        )
        changes = client.channel("canvas")
        changes.on_postgres_changes(
            "*",
            lambda change: received.add("change", change["data"]["record"]),
            table="workflow_nodes",
            schema="public",
            filter=f"workflow_id=eq.{workflow}",
        )
        changes.on_system(
            lambda message: received.add("system", message["message"] if isinstance(message, dict) else message.message)
        )
        results.append(["private", list(await subscribed(channel))])
        results.append(["changes", list(await subscribed(changes))])
        results.append(["system", await received.wait("system")])

        run = {"kind": "image_gen", "subject_id": workflow, "status": "pending", "processor": "demo:painter"}
        run |= {"metadata": {"nodeId": "n1", "promptSpec": {"basePrompt": "a red fox"}}}
        inserted = (await client.table("runs").insert(run).execute()).data[0]
        results.append(["inserted", inserted["status"]])
        for source in ("broadcast", "change"):
            row = await received.wait(source, shown("pending"))
            results.append(["heard", [row["id"], row["node_data"]["label"], row["node_data"]["status"]]])
        jobs = await (
            client.table("image_jobs")
            .select("nodeId, status", count="exact")
            .or_(f"jobId.eq.{inserted['id']},status.in.(running,failed)")
            .order("startedAt", desc=True)
            .range(0, 9)
            .execute()
        )
        results.append(["jobs", [jobs.data, jobs.count]])

        the_run = {"run_id": inserted["id"]}
        results.append(["cancelled", (await client.rpc("cancel_run", the_run).execute()).data["status"]])
        for source in ("broadcast", "change"):
            row = await received.wait(source, shown("cancelled"))
            results.append(["heard", row["node_data"]["status"]])
        results.append(["requeued", (await client.rpc("requeue_run", the_run).execute()).data["status"]])
        results.append(["twice", await refusal(client.rpc("requeue_run", the_run))])
        results.append(["unknown", await refusal(client.rpc("cancel_run", {"run_id": "nobody's"}))])
        results.append(["bad", await refusal(client.rpc("start_image_job", {"request": {"nodeId": "n1"}}))])
        forbidden = client.table("runs").update({"status": "completed"}).eq("id", inserted["id"])
        results.append(["forbidden", (await refusal(forbidden))[0]])

        outsider = await signed_in(project, http, outsider_token)
        results.append(["stranger sees", (await outsider.table("workflow_nodes").select("*").execute()).data])
        private = outsider.channel(f"workflow:{workflow}", {"config": {"private": True}})  # type: ignore[typeddict-item]
        results.append(["stranger hears", (await subscribed(private))[0]])
        await channel.unsubscribe()
        results.append(["left", "ok"])
        for each in (client, outsider):
            await each.realtime.close()
    return results


async def test_supabase_py_gets_the_expected_results(project: Project) -> None:
    results = await converse(project, project.token(str(uuid4())), project.token(str(uuid4())), str(uuid4()))
    assert results == CONVERSATION


async def test_supabase_js_gets_the_same_results(project: Project) -> None:
    results = await run_script(
        Path(__file__).with_name("conversation.mjs"),
        URL=project.url,
        KEY=project.keys.anon_key,
        TOKEN=project.token(str(uuid4())),
        STRANGER=project.token(str(uuid4())),
        WORKFLOW=str(uuid4()),
    )
    assert results == CONVERSATION


async def test_members_receive_runs_that_have_no_node(project: Project) -> None:
    workflow, received = str(uuid4()), Received()
    async with httpx.AsyncClient(timeout=20) as http:
        client = await signed_in(project, http, project.token(str(uuid4())))
        run = {"kind": "image_gen", "subject_id": workflow, "processor": "demo:painter", "status": "pending"}
        run |= {"metadata": {"promptSpec": {"basePrompt": "a red fox"}}}
        await client.table("runs").insert(run).execute()
        channel = client.channel(f"workflow:{workflow}", {"config": {"private": True}})  # type: ignore[typeddict-item]
        channel.on_broadcast(
            "runs_changed", lambda message: [received.add("run", each) for each in message["payload"]["runs"]]
        )
        assert await subscribed(channel) == ("SUBSCRIBED", None)
        inserted = (await client.table("runs").insert(run).execute()).data[0]
        await client.rpc("cancel_run", {"run_id": inserted["id"]}).execute()
        heard = await received.wait("run", lambda row: row["jobId"] == inserted["id"] and row["status"] == "cancelled")
        record = (await client.table("image_jobs").select("*").eq("jobId", inserted["id"]).single().execute()).data
        await client.realtime.close()
    assert isinstance(record, dict)
    assert record.keys() < heard.keys()
    assert (heard["workflowId"], heard["progress"]) == (workflow, 0)
