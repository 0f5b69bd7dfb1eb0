"""A picture is one however its provider spells it: real daemons and fakes of the APIs, and one request for each run."""

import base64
import json
from typing import Any
from urllib.parse import quote

import pytest

from tests.fakes.google_api import answered
from tests.fakes.midjourney_api import MidjourneyAPI
from tests.fakes.openai_api import document
from tests.fakes.openai_responses import ResponsesAPI, drawn
from tests.fakes.server import Response, picture
from tests.support.daemon_harness import fetch
from tests.support.midjourney_harness import midjourney_harness
from tests.support.multi_provider_harness import GOOGLE, STABILITY, MultiProviderHarness
from tests.support.openai_harness import OPENAI, background_harness

PNG = picture((64, 48)) + b"\0"  # its base64 ends with padding
B64 = base64.b64encode(PNG).decode()
TEXTS = [
    "\r\n".join(B64[start : start + 76] for start in range(0, len(B64), 76)),
    f"data:image/jpeg;base64,{B64.rstrip('=')}",
    f" DATA:;BASE64,{quote(B64.translate(str.maketrans('+/', '-_')), safe='')}\n",
]
LITERALS = [
    *(json.dumps(text) for text in TEXTS),
    json.dumps(B64).replace("=", "\\u003d").replace("/", "\\/"),
    '"' + "".join(f"\\u{ord(character):04X}" for character in B64) + '"',
]
"""JSON strings."""
SHAPES: dict[str, Any] = {
    OPENAI: {"created": 1, "data": [{"b64_json": "PICTURE"}]},
    GOOGLE: json.loads(answered({"inlineData": {"mimeType": "image/png", "data": "PICTURE"}}).body),
    STABILITY: {"image": "PICTURE", "finish_reason": "SUCCESS", "seed": 7},
}


@pytest.mark.parametrize("processor", SHAPES, ids=lambda it: it.partition(":")[0])
async def test_any_spelling_of_a_picture_costs_one_request(processor: str, providers: MultiProviderHarness) -> None:
    shape = json.dumps(SHAPES[processor])
    bodies = [shape.replace('"PICTURE"', literal).encode() for literal in LITERALS]
    api: Any = providers.api(processor)
    api.next(*[document(it) if processor == OPENAI else Response(200, it) for it in bodies])
    runs = [await providers.insert_run(processor) for _ in bodies]
    for run in runs:
        row = await providers.wait_for_status(run, "completed")
        assert (row["attempt"], row["payload"]["bytes"]) == (1, len(PNG))
        assert (await fetch(row["payload"]["imageUrl"])).content == PNG
    assert len(api.requests) == len(bodies)


async def test_any_spelling_of_a_background_picture_costs_one_job(database: str, responses_api: ResponsesAPI) -> None:
    async with background_harness(database, responses_api) as harness:
        for text in TEXTS:
            responses_api.stages = [responses_api.completed(drawn(result=text))]
            row = await harness.wait_for_status(await harness.insert_run(), "completed")
            assert (row["attempt"], row["payload"]["bytes"]) == (1, len(PNG))
    assert len(responses_api.jobs) == len(TEXTS)


async def test_any_spelling_of_a_midjourney_grid_costs_one_job(database: str, midjourney_api: MidjourneyAPI) -> None:
    async with midjourney_harness(database, midjourney_api) as harness:
        for text in TEXTS:
            midjourney_api.stages = [{"status": "SUCCESS", "progress": "100%", "imageUrl": text}]
            row = await harness.wait_for_status(await harness.insert_run(), "completed")
            assert (row["attempt"], row["payload"]["bytes"]) == (1, len(PNG))
    assert len(midjourney_api.jobs) == len(TEXTS)
