"""A picture that was paid for is taken, or kept, in whatever field of a response it comes: never is another one made for it."""

import json

import pytest

from daemon.errors import OutcomeUnknown, Retryable, Undecodable
from daemon.providers import Generated
from tests.fakes.server import Response
from tests.support.provider_callers import B64, PNG, Callers

ODD = "*" * 1001
"""No base64, and too long for a name."""
USAGE = {"input_tokens": 13, "output_tokens": 196, "input_tokens_details": {"text_tokens": 13, "image_tokens": 0}}
PARTIAL = {"type": "image_generation.partial_image", "b64_json": B64}
COMPLETED = {"type": "image_generation.completed", "b64_json": B64, "usage": USAGE}


def lines(*documents: object) -> Response:
    return Response(200, "\n".join(json.dumps(document) for document in documents).encode())


OF_OPENAI = [
    {"created": 1, "data": [B64]},
    {"created": 1, "data": [{"image": B64}]},
    {"images": [{"b64": f"data:image/png;base64,{B64}"}]},
    {"output": [{"content": f"![fox](data:image/png;base64,{B64})"}]},
    {"statusCode": 200, "body": json.dumps({"data": [{"b64_json": B64}]})},
    [COMPLETED],
    [PARTIAL, COMPLETED],
    json.dumps(COMPLETED),
    [B64],
]


@pytest.mark.parametrize("document", OF_OPENAI, ids=range(len(OF_OPENAI)))
async def test_picture_of_openai_is_taken_in_any_field(document: object, callers: Callers) -> None:
    made = await callers.call("openai", Response.json(200, document))
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG


async def test_lines_of_json_are_the_events_of_a_stream(callers: Callers) -> None:
    made = await callers.call("openai", lines(PARTIAL, COMPLETED))
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG
    assert made.cost == pytest.approx((13 * 5 + 196 * 30) / 1e6)


@pytest.mark.parametrize("response", [lines(PARTIAL), lines(PARTIAL, {"type": "image_generation.ended"})])
async def test_preview_alone_is_no_picture(response: Response, callers: Callers) -> None:
    assert isinstance(await callers.call("openai", response), OutcomeUnknown)


async def test_address_of_openai_is_followed_in_any_field(callers: Callers) -> None:
    made = await callers.call("openai", Response.json(200, {"output": [f" {callers.api.url}/picture\n"]}))
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG


@pytest.mark.parametrize("document", [{"data": [ODD]}, {"created": 1, "data": [{"jxl": ODD}]}, {"other": ODD}])
async def test_long_text_in_any_field_is_kept(document: object, callers: Callers) -> None:
    error = await callers.call("openai", Response.json(200, document))
    assert isinstance(error, Undecodable)
    assert error.path.read_text() == ODD


@pytest.mark.parametrize("name", ["input", "error", "thoughtSignature"])
async def test_picture_that_was_sent_is_no_result(name: str, callers: Callers) -> None:
    response = Response.json(200, {"created": 1, "data": [], "meta": {name: f"data:image/png;base64,{B64}"}})
    error = await callers.call("openai", response)
    assert isinstance(error, Retryable)
    assert error.code == "empty_result"
