"""Conversations of Google: the signature of an image goes from the response into a bucket of its own, back to Google when
the image is refined in its workflow, and nowhere else. A real daemon, database and storage, and a fake of the API."""

import json
from base64 import b64decode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from tests.fakes.google_api import KEY, SIGNATURE, THOUGHT, GoogleAPI, decoded
from tests.support.daemon_harness import DaemonHarness, fetch, start_harness
from tests.support.multi_provider_harness import GOOGLE
from tests.support.postgres import Cluster


@dataclass(kw_only=True)
class GoogleHarness(DaemonHarness):
    """A daemon and the API that it calls."""

    api: GoogleAPI

    async def complete_run(self, workflow: UUID, **prompt: Any) -> asyncpg.Record:
        """Insert a run and wait until it is completed. Returns the row."""
        (run,) = await self.insert_runs(1, workflow=workflow, prompt=prompt)
        return await self.wait_for_status(run, "completed")


@pytest.fixture(scope="module")
async def shared(postgres: Cluster) -> AsyncIterator[GoogleHarness]:
    async with GoogleAPI() as api, postgres.database() as dsn:
        environment = {"GOOGLE_API_KEY": KEY, "GOOGLE_BASE_URL": api.url}
        async with start_harness(GoogleHarness, dsn, environment=environment, processor=GOOGLE, api=api) as harness:
            yield harness


@pytest.fixture
async def harness(shared: GoogleHarness) -> AsyncIterator[GoogleHarness]:
    """The shared daemon; at the end no part of the signature may be in any row or log line."""
    shared.api.reset()
    await shared.db.execute("update storage.buckets set file_size_limit = 20971520 where not public")
    yield shared
    urlsafe = SIGNATURE.replace("+", "-").replace("/", "_")
    await shared.assert_not_written(SIGNATURE[:40], SIGNATURE[-40:], urlsafe[-40:])


async def test_conversation_is_sent_back_byte_for_byte(harness: GoogleHarness) -> None:
    workflow = uuid4()
    first = await harness.complete_run(workflow)
    second = await harness.complete_run(workflow, basePrompt="now at night", previousImage=first["payload"]["imageUrl"])

    request, response, now = harness.api.requests[1].fields["contents"]
    assert (request["parts"], now["parts"]) == ([{"text": "a red fox"}], [{"text": "now at night"}])
    (part,) = response["parts"]
    assert decoded(part["inlineData"]["data"]) == (await fetch(first["payload"]["imageUrl"])).content
    assert decoded(part["thoughtSignature"]) == THOUGHT
    (submitted,) = await harness.events(second["id"], "submitted")
    assert f"{len(THOUGHT)} bytes" in json.dumps(submitted["data"]["request"])
    assert await harness.events(second["id"], "warning") == []


async def test_conversation_is_readable_with_the_service_key_only(harness: GoogleHarness) -> None:
    workflow = uuid4()
    run = await harness.complete_run(workflow)
    project = harness.project
    key = f"images-context/{workflow}/{run['id']}.json"
    places = {
        name: f"{project.url}/storage/v1/object/{name}/{key}" for name in ("public", "authenticated", "info/public")
    }
    async with httpx.AsyncClient() as client:
        for url in places.values():
            for token in (project.keys.anon_key, None):
                headers = {"apikey": token, "authorization": f"Bearer {token}"} if token else {}
                response = await client.get(url, headers=headers)
                assert not response.is_success
                assert SIGNATURE[:40] not in response.text
        service = project.keys.service_role_key
        headers = {"apikey": service, "authorization": f"Bearer {service}"}
        document = (await client.get(places["authenticated"], headers=headers)).json()
    assert b64decode(document["response"][0]["signature"]) == THOUGHT


async def test_conversation_of_another_workflow_is_not_sent(harness: GoogleHarness) -> None:
    first = await harness.complete_run(uuid4())
    await harness.complete_run(uuid4(), previousImage=first["payload"]["imageUrl"])
    assert [len(call.fields["contents"]) for call in harness.api.requests] == [1, 1]


async def test_image_without_a_conversation_is_refined(harness: GoogleHarness) -> None:
    harness.api.thought = None
    workflow = uuid4()
    first = await harness.complete_run(workflow)
    second = await harness.complete_run(workflow, previousImage=first["payload"]["imageUrl"])
    assert harness.api.roles() == ["user"]
    assert await harness.events(second["id"], "warning") == []


async def test_unstorable_conversation_is_a_warning(harness: GoogleHarness) -> None:
    await harness.db.execute("update storage.buckets set file_size_limit = 100 where not public")
    row = await harness.complete_run(uuid4())
    assert row["payload"]["thumbnailUrl"]
    (warning,) = await harness.events(row["id"], "warning")
    assert warning["data"]["field"] == "context"
    assert len(harness.api.requests) == 1
