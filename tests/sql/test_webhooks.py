"""Webhooks as PostgREST hands them over: role anon, headers in a setting, the raw body as json."""

import base64
import json
from typing import Any

import asyncpg
import pytest

from tests.support.postgres import connect, signed_in
from tests.support.protocol import Daemon, Db, events, move_clock, new_daemon, run_in
from tests.support.runs import insert_run, run_row
from tests.support.webhooks import SECRET, Response, by_sql, hex_hmac, signed

BODY = '{"type": "response.completed", "data": {"id": "order-1"}}'


@pytest.fixture
async def secrets(db: Db) -> None:
    await db.execute(
        "select image_jobs.set_webhook_secrets($1)", {"openai": [SECRET], "hmac": [SECRET], "midjourney": [SECRET]}
    )


async def post(db: Db, provider: str, body: str, headers: dict[str, str]) -> Response:
    return await by_sql(db)(provider, body, headers)


async def deliveries(db: Db) -> list["asyncpg.Record"]:
    return await db.fetch("select * from image_jobs.webhook_deliveries order by received_at")


@pytest.mark.usefixtures("secrets")
async def test_signatures_of_standard_webhooks_are_accepted_once(db: Db) -> None:
    headers = signed(BODY)
    assert await post(db, "openai", BODY, headers) == (200, {"received": True, "duplicate": False})
    assert await post(db, "openai", BODY, headers) == (200, {"received": True, "duplicate": True})
    assert len(await deliveries(db)) == 1
    counter = await db.fetchrow("select sum(accepted), sum(duplicates), sum(refused) from image_jobs.webhook_counters")
    assert tuple(counter or ()) == (1, 1, 0)


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize(
    "damage",
    [
        {"webhook-signature": "v1,AAAA"},
        {"webhook-signature": ""},
        {"webhook-id": "another"},
        {"webhook-timestamp": "now"},
        {"webhook-timestamp": "9" * 400},
        {"webhook-signature": "v1,ä"},
    ],
)
async def test_a_damaged_header_is_refused(db: Db, damage: dict[str, str]) -> None:
    assert (await post(db, "openai", BODY, signed(BODY) | damage))[0] == 401
    assert not await deliveries(db)
    assert await db.fetchval("select refused from image_jobs.webhook_counters") == 1


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("offset", ["301 s", "-302 s"])
async def test_stale_and_future_timestamps_are_refused(db: Db, offset: str) -> None:
    headers = signed(BODY)
    await move_clock(db, offset)
    assert (await post(db, "openai", BODY, headers))[0] == 401


async def test_a_provider_without_a_secret_refuses_everything(db: Db) -> None:
    assert (await post(db, "openai", BODY, signed(BODY)))[0] == 401
    assert (await post(db, "hmac", BODY, {"webhook-signature": hex_hmac(BODY)}))[0] == 401
    assert (await post(db, "midjourney", '{"state": null}', {}))[0] == 401


async def test_while_a_secret_is_replaced_both_are_good(db: Db) -> None:
    new = "whsec_" + base64.b64encode(b"the next key, also long enough").decode()
    await db.execute("select image_jobs.set_webhook_secrets($1)", {"openai": [new, SECRET]})
    assert (await post(db, "openai", BODY, signed(BODY)))[0] == 200
    assert (await post(db, "openai", BODY, signed(BODY, message="msg_2", secret=new)))[0] == 200
    both = signed(BODY, message="msg_3")
    both["webhook-signature"] = "v1,AAAA v2,x " + both["webhook-signature"]
    assert (await post(db, "openai", BODY, both))[0] == 200
    await db.execute("select image_jobs.set_webhook_secrets($1)", {"openai": [new]})
    assert (await post(db, "openai", BODY, signed(BODY, message="msg_4")))[0] == 401


@pytest.mark.parametrize("secret", ["", "short", "whsec_", "whsec_c2hvcnQ="])
async def test_an_empty_or_short_secret_is_never_kept(db: Db, secret: str) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match="shorter than 16 bytes"):
        await db.execute("select image_jobs.set_webhook_secrets($1)", {"openai": [secret]})


@pytest.mark.one_postgres
@pytest.mark.parametrize("secret", ["whsec_!!!!!!!!!!!!!!!!!!!!!!!!", SECRET[:-1], "whsec_" + "_-" * 16])
async def test_a_secret_that_is_no_base64_is_called_that(db: Db, secret: str) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match="no base64 behind whsec_") as refused:
        await db.execute("select image_jobs.set_webhook_secrets($1)", {"openai": [secret]})
    assert refused.value.hint
    await db.execute("select image_jobs.set_webhook_secrets($1)", {"hmac": [secret]})


@pytest.mark.usefixtures("secrets")
async def test_the_same_body_twice_is_one_delivery_in_the_hex_scheme(db: Db) -> None:
    headers = {"webhook-signature": hex_hmac(BODY)}
    assert (await post(db, "hmac", BODY, headers))[1] == {"received": True, "duplicate": False}
    assert (await post(db, "hmac", BODY, headers))[1] == {"received": True, "duplicate": True}
    assert (await post(db, "hmac", BODY + " ", headers))[0] == 401


@pytest.mark.usefixtures("secrets")
async def test_the_hex_scheme_may_name_the_run(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    body = json.dumps({"job_id": run, "status": "completed"})
    assert (await post(db, "hmac", body, {"webhook-signature": hex_hmac(body).upper()}))[0] == 200
    assert (await daemon.claim_one())["id"] == run


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("by", ["order-1", "run"])
async def test_job_id_names_the_provider_job_or_the_run(db: Db, daemon: Daemon, nested: bool, by: str) -> None:
    """As the specification has them: `{type, data: {job_id, status}}`, and `{job_id, status}`."""
    run = await run_in(db, daemon, "parked")
    named = {"job_id": run if by == "run" else by, "status": "completed"}
    body = json.dumps({"type": "image.generation.status", "data": named} if nested else named)
    assert (await post(db, "hmac", body, {"webhook-signature": hex_hmac(body)}))[0] == 200
    assert (await events(db, run))[-1]["kind"] == "webhook"
    assert (await daemon.claim_one())["id"] == run


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("state", ["completed", "failed", "cancelled", "pending"])
async def test_receipt_of_any_run_is_an_event(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, state)
    before = await run_row(db, run)
    body = json.dumps({"type": "image.generation.status", "data": {"job_id": run, "status": "completed"}})
    for _ in range(2):
        assert (await post(db, "hmac", body, {"webhook-signature": hex_hmac(body)}))[0] == 200
    kinds = [event["kind"] for event in await events(db, run)]
    assert kinds.count("webhook") == 1
    assert await run_row(db, run) == before


def task(state: object, **fields: Any) -> str:
    """Return what a midjourney-proxy posts of a job: the whole task, its hook included."""
    hook = f"https://example.supabase.co/rest/v1/rpc/webhook_midjourney?apikey=eyJ{'a' * 200}.{'b' * 40}"
    return json.dumps(
        {
            "id": "order-1",
            "properties": {"notifyHook": hook, "finalPrompt": "a red fox --v 7", "progressMessageId": "1"},
            "action": "IMAGINE",
            "status": "SUCCESS",
            "prompt": "a red fox --v 7",
            "description": "/imagine a red fox --v 7",
            "state": state,
            "submitTime": 1795489358547,
            "finishTime": None,
            "progress": "100%",
            "imageUrl": "https://cdn.discordapp.com/attachments/1/2/grid.png?ex=65f&is=65f&hm=" + "0f" * 32,
            "failReason": None,
            **fields,
        },
        ensure_ascii=False,
    )


def echoed(run: str) -> str:
    """Return the state of a job of ours."""
    return f"{run}:7.{hex_hmac(f'{run}:7')}"


@pytest.mark.usefixtures("secrets")
async def test_midjourney_echoes_our_signature(db: Db) -> None:
    daemon = await new_daemon(db, "midjourney")
    run = await run_in(db, daemon, "parked", processor="midjourney:v7")
    assert await post(db, "midjourney", task(echoed(run)), {}) == (200, {"received": True, "duplicate": False})
    forged = (run, f"{run}:7", f"{run}:7.", f"{run}:8.{hex_hmac(f'{run}:7')}", f"{echoed(run)}.x", echoed(run)[:-1], 7)
    for state in (*forged, None, [echoed(run)], {"": echoed(run)}):
        assert (await post(db, "midjourney", task(state), {}))[0] == 401
    (delivery,) = await deliveries(db)
    assert (delivery["provider_job_id"], delivery["type"], delivery["run_id"]) == ("order-1", "SUCCESS", run)
    assert delivery["body"] == task(echoed(run))
    assert (await events(db, run))[-1]["kind"] == "webhook"
    assert (await daemon.claim_one())["id"] == run


@pytest.mark.usefixtures("secrets")
async def test_midjourney_webhooks_may_repeat_in_any_sequence(db: Db) -> None:
    daemon = await new_daemon(db, "midjourney")
    run = await run_in(db, daemon, "parked", processor="midjourney:v7")
    for status in ("SUCCESS", "IN_PROGRESS", "SUBMITTED"):
        for duplicate in (False, True):
            said = await post(db, "midjourney", task(echoed(run), status=status), {})
            assert said == (200, {"received": True, "duplicate": duplicate})
    claimed = await daemon.claim_one()
    assert claimed["id"] == run
    await post(db, "midjourney", task(echoed(run), status="IN_PROGRESS", progress="99%"), {})
    await daemon.park(claimed, due_in=60)
    assert (await daemon.claim_one())["id"] == run
    types = [event["data"]["type"] for event in await events(db, run) if event["kind"] == "webhook"]
    assert types == ["SUCCESS", "IN_PROGRESS", "SUBMITTED", "IN_PROGRESS"]


@pytest.mark.usefixtures("secrets")
async def test_a_midjourney_webhook_before_the_park_makes_it_due(db: Db) -> None:
    daemon = await new_daemon(db, "midjourney")
    run = await insert_run(db, processor="midjourney:v7")
    claimed = await daemon.claim_one()
    await post(db, "midjourney", task(echoed(run), status="SUBMITTED"), {})
    await daemon.park(claimed, due_in=60)
    assert (await daemon.claim_one())["id"] == run


@pytest.mark.usefixtures("secrets")
async def test_a_delivery_never_settles_a_run_but_has_it_checked_now(db: Db) -> None:
    daemon = await new_daemon(db, "openai")
    run = await run_in(db, daemon, "parked", processor="openai:gpt-image-2")
    assert not await daemon.claim()
    await post(db, "openai", BODY, signed(BODY))
    assert (await run_row(db, run))["status"] == "running"
    receipt = (await events(db, run))[-1]
    assert receipt["kind"] == "webhook"
    assert receipt["data"] == {"provider": "openai", "type": "response.completed", "delivery": "msg_1"}
    claimed = await daemon.claim_one()
    assert (claimed["id"], claimed["attempt"]) == (run, 1)


@pytest.mark.usefixtures("secrets")
async def test_a_webhook_before_the_park_makes_it_due(db: Db) -> None:
    daemon = await new_daemon(db, "openai")
    run = await insert_run(db, processor="openai:gpt-image-2")
    claimed = await daemon.claim_one()
    await post(db, "openai", BODY, signed(BODY))
    await daemon.park(claimed, due_in=60)
    again = await daemon.claim_one()
    assert again["id"] == run
    await daemon.park(again, due_in=60)
    assert not await daemon.claim()  # it was of use, once
    assert [event["kind"] for event in await events(db, run)].count("webhook") == 1


@pytest.mark.usefixtures("secrets")
async def test_a_webhook_during_a_check_makes_the_next_park_due(db: Db) -> None:
    daemon = await new_daemon(db, "openai")
    run = await run_in(db, daemon, "parked", processor="openai:gpt-image-2")
    await move_clock(db, "6 s")
    checking = await daemon.claim_one()
    await post(db, "openai", BODY, signed(BODY))
    await daemon.park(checking, due_in=60)
    assert (await daemon.claim_one())["id"] == run
    assert [event["kind"] for event in await events(db, run)].count("webhook") == 1


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("state", ["completed", "failed", "cancelled", "pending"])
async def test_a_late_or_unknown_webhook_changes_no_run(db: Db, state: str) -> None:
    daemon = await new_daemon(db, "openai")
    run = await run_in(db, daemon, state, processor="openai:gpt-image-2")
    before = await run_row(db, run)
    assert (await post(db, "openai", BODY, signed(BODY)))[0] == 200
    assert await run_row(db, run) == before


@pytest.mark.usefixtures("secrets")
async def test_a_webhook_of_one_provider_matches_no_job_of_another(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    before = await run_row(db, run)
    await post(db, "openai", BODY, signed(BODY))
    assert await run_row(db, run) == before


@pytest.mark.usefixtures("secrets")
async def test_a_sweep_matches_crossed_deliveries_for_an_hour(db: Db) -> None:
    daemon = await new_daemon(db, "openai")
    await post(db, "openai", BODY, signed(BODY))
    assert await db.fetchval("select image_jobs.sweep_webhooks()") == 0
    run = await insert_run(db, processor="openai:gpt-image-2")
    claimed = await daemon.claim_one()
    await db.execute("alter table runs disable trigger image_jobs_2_guard_columns")  # as if both had committed at once
    await daemon.park(claimed, due_in=3600)
    await db.execute("alter table runs enable trigger image_jobs_2_guard_columns")
    assert await db.fetchval("select image_jobs.sweep_webhooks()") == 1
    assert (await daemon.claim_one())["id"] == run
    await post(db, "openai", BODY, signed(BODY, message="msg_2"))
    await move_clock(db, "61 min")
    await db.execute("select image_jobs.sweep_webhooks()")
    assert all(delivery["closed_at"] for delivery in await deliveries(db))
    await move_clock(db, "8 days")
    await db.execute("select image_jobs.sweep_webhooks()")
    assert not await deliveries(db)


@pytest.mark.usefixtures("secrets")
async def test_a_route_of_the_application_calls_receive_webhook(db: Db) -> None:
    headers = {name.title(): value for name, value in signed(BODY).items()}
    async with signed_in(db, role="service_role"):
        said = await db.fetchval("select receive_webhook('openai', $1, $2)", headers, BODY)
    assert said == {"received": True, "duplicate": False}


@pytest.mark.usefixtures("secrets")
async def test_a_body_with_base64_is_received_and_not_kept(db: Db) -> None:
    body = json.dumps({"data": {"id": "order-1", "image": "data:image/png;base64,iVBORw0KGgo"}})
    assert (await post(db, "openai", body, signed(body)))[0] == 200
    assert [delivery["body"] for delivery in await deliveries(db)] == [None]


@pytest.mark.usefixtures("secrets")
async def test_webhook_functions_take_one_json_and_run_as_their_caller(db: Db) -> None:
    doors = await db.fetch(
        "select proargtypes::text, proargnames, prosecdef from pg_proc "
        "where pronamespace = 'public'::regnamespace and proname like 'webhook\\_%'"
    )
    assert {tuple(door) for door in doors} == {("114", None, False)}


@pytest.mark.usefixtures("secrets")
async def test_a_good_call_does_not_wait_until_bad_ones_are_counted(db: Db, database: str) -> None:
    flood = await connect(database)
    try:
        async with flood.transaction():
            assert (await post(flood, "openai", BODY, {}))[0] == 401
            await db.execute("set lock_timeout = '2s'")
            assert (await post(db, "openai", BODY, signed(BODY)))[0] == 200
    finally:
        await flood.close()


@pytest.mark.usefixtures("secrets")
async def test_a_state_has_twenty_places_whatever_its_bodies(db: Db) -> None:
    """The signature is of the state alone: who has seen one may send any body with it."""
    daemon = await new_daemon(db, "midjourney")
    run = await run_in(db, daemon, "parked", processor="midjourney:v7")
    for number in range(30):
        body = task(echoed(run), number=number, padding="x " * 10_000 if number % 2 else "")
        assert await post(db, "midjourney", body, {}) == (200, {"received": True, "duplicate": False})
    kept = await deliveries(db)
    assert len(kept) == 20
    assert all(len(delivery["body"] or "") <= 16_384 for delivery in kept)
    assert sum(delivery["body"] is None for delivery in kept) == 10
    assert sum(event["kind"] == "webhook" for event in await events(db, run)) == 20
    claimed = await daemon.claim_one()
    await post(db, "midjourney", task(echoed(run), number=31), {})
    await daemon.park(claimed, due_in=60)
    assert (await daemon.claim_one())["id"] == run
