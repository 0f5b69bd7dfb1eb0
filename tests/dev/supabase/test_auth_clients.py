"""The Auth stand-in by the official clients: supabase-js and supabase-py get the same results from it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from postgrest import APIError
from supabase import AsyncClient, AsyncClientOptions, AuthError, acreate_client

from tests.support.node import run_script
from tests.support.postgres import Cluster
from tests.support.realtime_project import Project, Wire, running

EMAIL = "Fox@example.com"
CONVERSATION = [
    ["anonymous", [True, "authenticated", "", {"name": "fox"}, "bearer"]],
    ["node", {"id": "n1"}],
    ["refreshed", [True, True]],
    ["verified", True],
    [
        "no address",
        [
            "validation_failed",
            "Updating password of an anonymous user without an email or phone is not allowed",
        ],
    ],
    ["permanent", [True, False, "fox@example.com", "email", 2]],
    ["identity", [1, "email", "fox@example.com"]],
    ["same password", ["same_password", "New password should be different from the old password."]],
    ["signed out", None],
    ["closed", "42501"],
    ["wrong", ["invalid_credentials", "Invalid login credentials"]],
    ["again", True],
    ["its node", [{"id": "n1"}]],
    ["taken", ["user_already_exists", "User already registered"]],
    ["weak", ["weak_password", "Password should be at least 6 characters."]],
    ["no e-mail", ["validation_failed", "Unable to validate email address: invalid format"]],
    ["up", True],
    [
        "mail",
        "image-jobs dev does not have POST /auth/v1/otp: it signs in anonymously, or by e-mail and password, and sends no mail.",
    ],
]


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """Send for the clients of supabase-py, which do not close their own connections."""
    async with httpx.AsyncClient(timeout=20) as client:
        yield client


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator[Project]:
    async with running(postgres) as one:
        yield one


async def client_of(project: Project, http: httpx.AsyncClient) -> AsyncClient:
    options = AsyncClientOptions(httpx_client=http, auto_refresh_token=False, persist_session=False)
    return await acreate_client(project.url, project.keys.anon_key, options)


async def refusal(call: Awaitable[Any]) -> list[str | None]:
    with pytest.raises((AuthError, APIError)) as caught:
        await call
    return [getattr(caught.value, "code", None), caught.value.message]


async def sign_in_and_out(project: Project, http: httpx.AsyncClient, workflow: str) -> list[Any]:
    """Do the same as sign_in.mjs, by supabase-py."""
    client, results = await client_of(project, http), []
    signed = await client.auth.sign_in_anonymously({"options": {"data": {"name": "fox"}}})
    user, session = signed.user, signed.session
    assert user is not None
    assert session is not None
    first = [user.is_anonymous, user.role, user.email, user.user_metadata, session.token_type]
    results.append(["anonymous", first])
    node = {"id": "n1", "workflow_id": workflow, "node_type": "image", "node_data": {}}
    inserted = (await client.table("workflow_nodes").insert(node).execute()).data[0]
    results.append(["node", {"id": inserted["id"]}])
    refreshed = await client.auth.refresh_session()
    assert refreshed.user is not None
    assert refreshed.session is not None
    same = refreshed.user.id == user.id
    results.append(["refreshed", [same, refreshed.session.refresh_token != session.refresh_token]])
    found = await client.auth.get_user()
    results.append(["verified", found is not None and found.user.id == user.id])

    results.append(["no address", await refusal(client.auth.update_user({"password": "secret1"}))])
    changes: Any = {"email": EMAIL, "password": "secret1", "data": {"name": None, "age": 2}}
    now = (await client.auth.update_user(changes)).user
    kept = [now.id == user.id, now.is_anonymous, now.email, now.app_metadata["provider"], now.user_metadata["age"]]
    results.append(["permanent", kept])
    (identity,) = now.identities or []
    results.append(["identity", [1, identity.provider, identity.identity_data["email"]]])
    results.append(["same password", await refusal(client.auth.update_user({"password": "secret1"}))])
    results.append(["signed out", await client.auth.sign_out()])
    results.append(["closed", (await refusal(client.table("workflow_nodes").select("id").execute()))[0]])

    wrong = client.auth.sign_in_with_password({"email": EMAIL, "password": "secret2"})
    results.append(["wrong", await refusal(wrong)])
    again = await client.auth.sign_in_with_password({"email": EMAIL, "password": "secret1"})
    results.append(["again", again.user is not None and again.user.id == user.id])
    results.append(["its node", (await client.table("workflow_nodes").select("id").execute()).data])

    other = await client_of(project, http)
    results.append(["taken", await refusal(other.auth.sign_up({"email": EMAIL, "password": "secret1"}))])
    results.append(["weak", await refusal(other.auth.sign_up({"email": "owl@example.com", "password": "short"}))])
    results.append(["no e-mail", await refusal(other.auth.sign_up({"email": "owl", "password": "secret1"}))])
    up = await other.auth.sign_up({"email": "owl@example.com", "password": "secret1"})
    results.append(["up", up.session is not None])
    results.append(["mail", (await refusal(other.auth.sign_in_with_otp({"email": EMAIL})))[1]])
    return results


async def test_supabase_py_signs_up_in_out_and_refreshes(project: Project, http: httpx.AsyncClient):
    assert await sign_in_and_out(project, http, str(uuid4())) == CONVERSATION


async def test_supabase_js_signs_up_in_out_and_refreshes(project: Project):
    script = Path(__file__).with_name("sign_in.mjs")
    found = await run_script(script, URL=project.url, KEY=project.keys.anon_key, WORKFLOW=str(uuid4()))
    assert found == CONVERSATION


@pytest.fixture(scope="module")
async def brief(postgres: Cluster) -> AsyncIterator[Project]:
    """A project whose access tokens expire after 2 to 3 seconds."""
    async with running(postgres, lifetime=timedelta(seconds=3)) as one:
        yield one


async def test_a_channel_of_supabase_js_outlives_two_tokens(brief: Project):
    script = Path(__file__).with_name("renewal.mjs")
    found = await run_script(script, URL=brief.url, KEY=brief.keys.anon_key, WORKFLOW=str(uuid4()))
    assert found == [["SUBSCRIBED"], "n2"]


async def renew_until(client: AsyncClient, wire: Wire) -> list[str]:
    """Renew a client's token until a channel that keeps its own is closed. Return the last two messages of that one."""
    frames = asyncio.create_task(wire.next(2))
    while not frames.done():
        await client.auth.refresh_session()
        await asyncio.wait([frames], timeout=0.5)
    system, closed = await frames
    return [system["payload"]["message"], closed["event"]]


async def test_a_channel_of_supabase_py_outlives_two_tokens(brief: Project, http: httpx.AsyncClient):
    workflow, heard = str(uuid4()), asyncio.Queue[str]()
    client = await client_of(brief, http)
    signed = await client.auth.sign_in_anonymously()
    node = {"id": "n3", "workflow_id": workflow, "node_type": "image", "node_data": {}}
    await client.table("workflow_nodes").insert(node).execute()
    channel = client.channel(f"workflow:{workflow}", {"config": {"private": True}})  # type: ignore[typeddict-item]
    channel.on_broadcast("nodes_changed", lambda message: heard.put_nowait(message["payload"]["nodes"][0]["id"]))
    await client.realtime.set_auth(signed.session.access_token if signed.session else None)
    states: list[str] = []
    await channel.subscribe(lambda state, _: states.append(state.value))
    for _ in range(2):
        session = (await client.auth.refresh_session()).session
        assert session is not None
        async with brief.wire("1.0.0") as wire:
            (joined,) = await wire.join(f"realtime:workflow:{workflow}", "1", token=session.access_token, private=True)
            assert joined["payload"]["status"] == "ok"
            assert await renew_until(client, wire) == ["InvalidJWTToken: Token has expired 0 seconds ago", "phx_close"]
    await client.table("workflow_nodes").insert({**node, "id": "n4"}).execute()
    async with asyncio.timeout(15):
        assert await heard.get() == "n4"
    assert states == ["SUBSCRIBED"]
    await client.realtime.close()
