"""A picture of Google's is refined in its workflow: the signature of the turn before goes from the answer into a bucket
of its own and back to Google, and is nowhere else. A real daemon, database and storage, and a fake of the API."""

import json
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from tests.fakes.google_api import KEY, SIGNATURE, THOUGHT, GoogleAPI, decoded
from tests.fakes.openai_api import OpenAIAPI
from tests.openai_studio import Studio, open_studio
from tests.postgres import Cluster
from tests.runs import insert_run

PROCESSOR = "google:gemini-nano-banana-2.1"


@dataclass
class Atelier:
    """One daemon that works for Google."""

    studio: Studio
    api: GoogleAPI

    async def draw(self, workflow: UUID, **prompt: Any) -> asyncpg.Record:
        """The row of a run that has come to its picture."""
        run = await insert_run(self.studio.db, processor=PROCESSOR, workflow=workflow, prompt=prompt)
        return await self.studio.until(run, "completed")

    async def everything(self) -> str:
        """Every row of every table, and every log line."""
        tables = await self.studio.db.fetch(
            "select format('%I.%I', schemaname, tablename) as name from pg_tables"
            " where schemaname in ('public', 'private', 'storage')"
        )
        rows = [await self.studio.db.fetch(f"select t::text as row from {table['name']} t") for table in tables]
        return "\n".join([row["row"] for table in rows for row in table] + self.studio.daemon.raw)


@pytest.fixture(scope="module")
async def shared(postgres: Cluster) -> AsyncIterator[Atelier]:
    async with AsyncExitStack() as opened:
        api = await opened.enter_async_context(GoogleAPI())
        other = await opened.enter_async_context(OpenAIAPI())
        dsn = await opened.enter_async_context(postgres.database())
        environment = {"GOOGLE_API_KEY": KEY, "GOOGLE_BASE_URL": api.url}
        yield Atelier(await opened.enter_async_context(open_studio(dsn, other, **environment)), api)


@pytest.fixture
async def atelier(shared: Atelier) -> AsyncIterator[Atelier]:
    shared.api.reset()
    await shared.studio.db.execute("update storage.buckets set file_size_limit = 20971520 where not public")
    yield shared
    written = await shared.everything()
    for start in (SIGNATURE[:40], SIGNATURE[-40:], SIGNATURE.replace("+", "-").replace("/", "_")[-40:]):
        assert start not in written


async def test_refining_a_picture_hands_its_turn_back_byte_for_byte(atelier: Atelier) -> None:
    workflow = uuid4()
    first = await atelier.draw(workflow)
    second = await atelier.draw(workflow, basePrompt="now at night", previousImage=first["payload"]["imageUrl"])

    asked, answer, now = atelier.api.requests[1].fields["contents"]
    assert (asked["parts"], now["parts"]) == ([{"text": "a red fox"}], [{"text": "now at night"}])
    (part,) = answer["parts"]
    async with httpx.AsyncClient() as client:
        assert decoded(part["inlineData"]["data"]) == (await client.get(first["payload"]["imageUrl"])).content
    assert decoded(part["thoughtSignature"]) == THOUGHT
    (submitted,) = await atelier.studio.events(second["id"], "submitted")
    assert f"{len(THOUGHT)} bytes" in json.dumps(submitted["data"]["request"])
    assert await atelier.studio.events(second["id"], "warning") == []


async def test_nobody_but_the_daemon_can_read_what_is_kept(atelier: Atelier) -> None:
    workflow = uuid4()
    run = await atelier.draw(workflow)
    project = atelier.studio.project
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
    assert b64decode(document["answered"][0]["signature"]) == THOUGHT


async def test_the_turn_of_another_workflow_is_not_told(atelier: Atelier) -> None:
    first = await atelier.draw(uuid4())
    await atelier.draw(uuid4(), previousImage=first["payload"]["imageUrl"])
    assert [len(call.fields["contents"]) for call in atelier.api.requests] == [1, 1]


async def test_a_picture_of_which_nothing_was_kept_is_refined_all_the_same(atelier: Atelier) -> None:
    atelier.api.thought = None
    workflow = uuid4()
    first = await atelier.draw(workflow)
    second = await atelier.draw(workflow, previousImage=first["payload"]["imageUrl"])
    assert atelier.api.turns() == ["user"]
    assert await atelier.studio.events(second["id"], "warning") == []


async def test_a_turn_that_storage_does_not_take_is_a_warning_and_no_failed_run(atelier: Atelier) -> None:
    await atelier.studio.db.execute("update storage.buckets set file_size_limit = 100 where not public")
    row = await atelier.draw(uuid4())
    assert row["payload"]["thumbnailUrl"]
    (warning,) = await atelier.studio.events(row["id"], "warning")
    assert warning["data"]["field"] == "context"
    assert len(atelier.api.requests) == 1
