"""Runs and responses that look like secrets or files, with a whole daemon: each ends right, with one paid call."""

import json
from uuid import uuid4

import pytest

from tests.fakes.openai_api import Call, document, status
from tests.support.openai_harness import COST, OPENAI, OpenAIHarness
from tests.support.postgres import wait_until

FILE = "data:image/png;base64," + "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk" * 90


@pytest.mark.parametrize("prefix", ["sk-SK-hero-image-2026-11-27", "rk-0123456789abcdef-picture", "AIza" + "x" * 40])
async def test_a_run_named_like_a_key_is_paid_for_once(openai: OpenAIHarness, prefix: str) -> None:
    run = f"{prefix}-{uuid4().hex[:6]}"
    await openai.db.execute(
        "insert into runs (id, kind, subject_id, status, processor, metadata) values ($1, 'image_gen', $2, 'pending', $3, $4)",
        run,
        uuid4(),
        OPENAI,
        {"promptSpec": {"basePrompt": "a red fox"}},
    )
    row = await openai.wait_for_status(run, "completed")
    assert (row["attempt"], row["payload"]["cost"]) == (1, pytest.approx(COST))
    assert f"/{run}.png" in row["payload"]["imageUrl"]
    assert len(openai.api.requests) == 1
    await wait_until(lambda: any(line.get("run_id") == run for line in openai.daemon.lines))


async def test_an_error_that_quotes_a_data_url_ends_its_run(openai: OpenAIHarness) -> None:
    said = f"Invalid 'image_url'. Expected a valid URL or base64 '{FILE}', as in 'data:image/png;base64,...'."
    openai.api.next(status(400, "invalid_value", message=said))
    run = await openai.insert_run()
    payload = (await openai.wait_for_status(run, "failed"))["payload"]
    assert payload["code"] == "invalid_request"
    assert "Expected a valid URL or base64 'data:image/png; base64," in payload["error"]
    assert payload["hint"] == "Change the prompt or its options, and requeue."
    assert await openai.event_names(run) == ["created", "claimed", "submitted", "warning", "failed"]
    assert (await openai.node_data(run))["error"] == payload["error"]
    assert len(openai.api.requests) == 1


async def test_a_picture_in_the_revised_prompt_costs_one_call(openai: OpenAIHarness) -> None:
    drawn = Call("", {}, {"size": "64x64"})
    item = {"b64_json": openai.api.encoded(drawn), "revised_prompt": f"A fox.\n\n![a fox]({FILE})\n\nThe end."}
    openai.api.next(document(json.dumps({"created": 1, "data": [item]}).encode()))
    run = await openai.insert_run()
    row = await openai.wait_for_status(run, "completed")
    assert row["payload"]["revisedPrompt"] == "A fox.\n\n![a fox](data:image/png; base64,…)\n\nThe end."
    assert len(openai.api.requests) == 1
    warnings = await openai.events(run, "warning")
    assert [warning["data"]["fields"] for warning in warnings] == [["generated: revisedPrompt"], ["revisedPrompt"]]
