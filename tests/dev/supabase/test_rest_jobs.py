"""Our RPCs, tables and webhooks through the REST stand-in."""

import hashlib
import hmac
from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest
from postgrest import APIError

from tests.support.postgres import Cluster
from tests.support.rest_project import SECRET, Project, running


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator[Project]:
    """A project for one test."""
    async with running(postgres) as one:
        yield one


async def test_a_user_starts_follows_cancels_and_requeues_a_run(project: Project) -> None:
    client = await project.client(project.sign_in(uuid4()))
    workflow = str(uuid4())
    node = {"id": "n1", "workflow_id": workflow, "node_type": "image", "node_data": {"label": "fox"}}
    await client.table("workflow_nodes").insert(node).execute()
    request = {
        "nodeId": "n1",
        "workflowId": workflow,
        "promptSpec": {"basePrompt": "a red fox"},
        "provider": "demo",
        "model": "painter",
    }
    started = (await client.rpc("start_image_job", {"request": request}).execute()).data
    assert (started["status"], started["nodeId"]) == ("pending", "n1")
    run = {"kind": "image_gen", "subject_id": workflow, "status": "pending", "processor": "demo:painter"}
    run["metadata"] = {"nodeId": "n1", "promptSpec": {"basePrompt": "a bear"}}
    inserted = (await client.table("runs").insert(run).execute()).data[0]
    jobs = await client.table("image_jobs").select("jobId,nodeId").eq("workflowId", workflow).execute()
    assert {job["jobId"] for job in jobs.data} == {started["jobId"], inserted["id"]}
    cancelled = (await client.rpc("cancel_run", {"run_id": started["jobId"]}).execute()).data
    assert cancelled["status"] == "cancelled"
    requeued = (await client.rpc("requeue_run", {"run_id": started["jobId"]}).execute()).data
    assert requeued["status"] == "pending"


async def test_refusals_have_a_message_and_a_hint(project: Project) -> None:
    user = await project.client(project.sign_in(uuid4()))
    with pytest.raises(APIError) as caught:
        await user.rpc("start_image_job", {"request": {}}).execute()
    assert (caught.value.code, caught.value.message) == ("22023", "nodeId is missing.")
    assert caught.value.hint
    with pytest.raises(APIError) as caught:
        await user.rpc("cancel_run", {"run_id": "job_of_another"}).execute()
    assert caught.value.code == "PT404"
    anonymous = await project.client()
    with pytest.raises(APIError) as caught:
        await anonymous.rpc("cancel_run", {"run_id": "x"}).execute()
    assert caught.value.code == "42501"


async def test_a_non_member_sees_nothing(project: Project) -> None:
    owner, outsider = [await project.client(project.sign_in(uuid4())) for _ in range(2)]
    node = {"id": "n1", "workflow_id": str(uuid4()), "node_type": "image", "node_data": {}}
    await owner.table("workflow_nodes").insert(node).execute()
    assert len((await owner.table("workflow_nodes").select("*").execute()).data) == 1
    assert (await outsider.table("workflow_nodes").select("*").execute()).data == []
    assert (await outsider.table("workflow_nodes").update({"node_type": "x"}).eq("id", "n1").execute()).data == []
    with pytest.raises(APIError) as caught:
        await outsider.table("workflow_nodes").insert({**node, "id": "n2"}).execute()
    assert caught.value.code == "42501"


async def test_a_webhook_arrives_byte_for_byte(project: Project) -> None:
    body = '{"b":1.0,\r\n "a":2,"a":3 , "id":"order-1"} '
    await project.db.execute("select image_jobs.set_webhook_secrets($1)", {"hmac": [SECRET]})
    signature = hmac.new(SECRET.encode(), body.encode(), hashlib.sha256).hexdigest()

    async def post(content: str) -> httpx.Response:
        return await project.send(
            "POST", "/rpc/webhook_hmac", content=content, webhook_signature=signature, content_type="application/json"
        )

    accepted, damaged = await post(body), await post(body + " ")
    assert (accepted.status_code, accepted.json()) == (200, {"received": True, "duplicate": False})
    assert (damaged.status_code, damaged.json()["code"]) == (401, "PT401")
    assert await project.db.fetchval("select array_agg(body) from image_jobs.webhook_deliveries") == [body]
