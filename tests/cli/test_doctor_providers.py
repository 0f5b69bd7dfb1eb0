"""doctor and the providers: do they accept the keys, and which living daemon serves them."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from pydantic import SecretStr

from daemon.cli.doctor.providers import check_daemons, check_keys, living_daemons
from daemon.settings import Settings
from tests.fakes import google_api, midjourney_api, openai_api, stability_api
from tests.fakes.google_api import GoogleAPI
from tests.fakes.midjourney_api import MidjourneyAPI
from tests.fakes.openai_api import OpenAIAPI, document, status
from tests.fakes.server import FakeAPI, Response
from tests.fakes.stability_api import StabilityAPI
from tests.support.commands import ImageJobs, insert_run
from tests.support.runs import insert_runs

Db = asyncpg.Connection
Apis = dict[str, Any]

KEYS = {
    "openai": ("OPENAI_API_KEY", "OPENAI_BASE_URL", openai_api.KEY),
    "google": ("GOOGLE_API_KEY", "GOOGLE_BASE_URL", google_api.KEY),
    "stability": ("STABILITY_API_KEY", "STABILITY_BASE_URL", stability_api.KEY),
    "midjourney": ("MIDJOURNEY_API_KEY", "MIDJOURNEY_API_URL", midjourney_api.KEY),
}


@pytest.fixture(scope="module")
async def apis() -> AsyncIterator[Apis]:
    """Fakes of all providers."""
    async with AsyncExitStack() as stack:
        yield {
            "openai": await stack.enter_async_context(OpenAIAPI()),
            "google": await stack.enter_async_context(GoogleAPI()),
            "stability": await stack.enter_async_context(StabilityAPI()),
            "midjourney": await stack.enter_async_context(MidjourneyAPI()),
        }


@pytest.fixture(autouse=True)
def as_new(apis: Apis) -> None:
    for api in apis.values():
        api.reset()


def settings_of(apis: Apis, name: str, key: str | None = None) -> Settings:
    variable, address, right = KEYS[name]
    return Settings(_env_file=None, **{variable: SecretStr(key or right), address: apis[name].url})


async def finding(settings: Settings) -> tuple[str, str, str]:
    (found,) = await check_keys(settings, {})
    assert found.name == "providers"
    return found.state, found.message, found.cure


@pytest.mark.parametrize("name", KEYS)
async def test_a_key_is_proved_by_a_free_request(apis: Apis, name: str) -> None:
    assert await finding(settings_of(apis, name)) == ("ok", f"{name}: the key is accepted.", "")
    # The fake of OpenAI writes down what costs money, and nothing else.
    assert [call.method for call in apis[name].requests] == ([] if name == "openai" else ["GET"])


@pytest.mark.parametrize("name", KEYS)
async def test_a_wrong_key_is_a_problem_with_a_cure(apis: Apis, name: str) -> None:
    state, message, cure = await finding(settings_of(apis, name, "sk-not-the-right-one"))
    assert state == "problem"
    assert message.startswith(f"{name}: ")
    assert message.endswith("does not accept our key.")
    assert f"Set {KEYS[name][0]} to a valid key" in cure


@pytest.mark.parametrize("name", ["google", "stability", "midjourney"])
@pytest.mark.parametrize("number", [403, 404, 429, 500, 503])
async def test_only_a_refusal_is_a_problem(apis: Apis, name: str, number: int) -> None:
    api: FakeAPI = apis[name]
    api.next(Response.json(number, {"name": "no", "errors": ["no"], "error": {"message": "no", "status": "NO"}}))
    state, message, _ = await finding(settings_of(apis, name))
    assert state == ("problem" if number == 403 else "info")
    assert message.startswith(f"{name}: ")


async def test_a_key_for_images_alone_is_accepted(apis: Apis) -> None:
    said = "You have insufficient permissions for this operation. Missing scopes: api.model.read."
    apis["openai"].next(status(403, None, message=said), status(403, None, message="Your country is not supported."))
    assert (await finding(settings_of(apis, "openai")))[0] == "ok"
    assert (await finding(settings_of(apis, "openai")))[0] == "problem"


async def test_a_compatible_server_without_models_is_not_blamed(apis: Apis) -> None:
    apis["openai"].next(status(404, None), document(b"<html>Welcome</html>", content_type="text/html"))
    assert (await finding(settings_of(apis, "openai")))[0] == "info"
    assert (await finding(settings_of(apis, "openai")))[0] == "ok"


@pytest.mark.parametrize("name", KEYS)
async def test_a_provider_that_is_away_is_only_said(apis: Apis, name: str) -> None:
    variable, address, right = KEYS[name]
    settings = Settings(_env_file=None, **{variable: SecretStr(right), address: "http://127.0.0.1:1"})
    state, message, _ = await finding(settings)
    assert state == "info"
    assert "cannot be reached" in message


async def test_each_provider_has_a_finding_of_its_own(apis: Apis) -> None:
    keys = {variable: SecretStr(right) for variable, _, right in KEYS.values()}
    addresses = {address: apis[name].url for name, (_, address, _) in KEYS.items()}
    settings = Settings(
        _env_file=None, IMAGE_JOBS_DEMO=True, **{**keys, **addresses, "STABILITY_API_KEY": SecretStr("sk-no")}
    )
    found = {each.message.partition(":")[0]: each.state for each in await check_keys(settings, {})}
    assert found == {"demo": "ok", "google": "ok", "midjourney": "ok", "openai": "ok", "stability": "problem"}


# Daemons


async def register(db: Db, name: str, *providers: str) -> None:
    await db.execute("select image_jobs.register_daemon($1, $2, '0', 4, '30 s', $3)", uuid4(), name, list(providers))


async def findings(db: Db, *configured: str) -> list[tuple[str, str]]:
    found = await check_daemons(db, await living_daemons(db), list(configured))
    assert all(each.cure for each in found if each.state == "problem")
    return [(each.state, each.message) for each in found]


async def test_no_daemon_alive_is_a_problem(db: Db) -> None:
    assert await findings(db, "openai") == [("problem", "No daemon is alive; no run waits for one.")]
    await insert_runs(db, 2)
    assert await findings(db) == [("problem", "No daemon is alive, and 2 runs wait for one.")]


async def test_living_daemons_are_named_with_their_providers(db: Db) -> None:
    await register(db, "one", "openai", "demo")
    await register(db, "two", "google")
    await register(db, "silent", "stability")
    await db.execute("update image_jobs.daemons set seen_at = now() - interval '1 day' where name = 'silent'")
    await insert_runs(db, 1, processor="stability:core")
    assert await findings(db, "openai", "midjourney") == [
        ("info", "2 alive: one serves demo, openai; two serves google."),
        ("info", "No daemon that is alive serves midjourney, though it has a key here."),
        ("problem", "No daemon that is alive serves stability, and 1 run waits for it."),
    ]


async def test_daemons_of_one_host_are_told_apart(db: Db) -> None:
    await register(db, "host", "demo")
    await register(db, "host", "demo")
    assert len(await living_daemons(db)) == 2


async def test_runs_that_are_put_off_or_held_do_not_wait(db: Db) -> None:
    await insert_runs(db, 3)
    await db.execute("update runs set due_at = now() + interval '1 day'")
    assert await findings(db) == [("problem", "No daemon is alive; no run waits for one.")]


async def test_doctor_fails_for_a_wrong_key_and_waiting_runs(
    image_jobs: ImageJobs, database: str, db: Db, apis: Apis, tmp_path: Path
) -> None:
    await insert_run(db, "waiting")
    environment = {"OPENAI_API_KEY": "sk-of-somebody-else-entirely", "OPENAI_BASE_URL": apis["openai"].url}
    done = await image_jobs("doctor", "--json", DATABASE_URL=database, **environment)
    assert done.code == 1
    found = {each["name"]: each for each in done.json}
    assert found["daemons"]["message"] == "No daemon is alive, and 1 run waits for one."
    assert found["providers"]["state"] == found["daemons"]["state"] == "problem"
    assert "OPENAI_API_KEY" in found["providers"]["cure"]
    assert "somebody-else" not in done.out + done.err
