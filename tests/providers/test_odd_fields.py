"""A picture that was paid for is taken, or kept, in whatever field of a response it comes: never is another one made for it."""

import json
from dataclasses import replace

import pytest

from daemon.errors import OutcomeUnknown, Retryable, RunError, Undecodable
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


PARTS = [{"text": "A fox."}, {"inlineData": {"data": B64}, "thoughtSignature": "c2lnbmVk"}]


def content(*parts: object, index: int = 0, finish: str | None = "STOP") -> dict[str, object]:
    return {"index": index, "content": {"parts": list(parts)}, "finishReason": finish}


STREAM = [
    {"candidates": [content(PARTS[0], finish=None)]},
    {"candidates": [content(PARTS[1])], "usageMetadata": {"candidatesTokenCount": 1120}},
]
OF_GOOGLE = [
    Response.json(200, STREAM),
    Response(200, b"".join(b"data: " + json.dumps(document).encode() + b"\n\n" for document in STREAM)),
    replace(Response(200, b"".join(json.dumps(document).encode() + b"\n" for document in STREAM) + b"{"), cut=2000),
    Response.json(200, {"candidates": [content(PARTS[0]), content(PARTS[1], index=1)]}),
    Response.json(200, {"candidates": [content({"text": f"![fox](data:image/png;base64,{B64})"})]}),
    Response.json(200, {"predictions": [{"bytesBase64Encoded": B64, "mimeType": "image/png"}]}),
    Response.json(200, {"candidates": [{"content": [{"parts": PARTS}]}]}),
]


@pytest.mark.parametrize("response", OF_GOOGLE, ids=range(len(OF_GOOGLE)))
async def test_picture_of_google_is_taken_wherever_it_is(response: Response, callers: Callers) -> None:
    made = await callers.call("google", response)
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG
    assert made.cost is not None


@pytest.mark.parametrize(
    "response",
    [
        replace(Response.json(200, STREAM[:1]), cut=40),
        Response(200, b'[{"candidates": []}, 5]'),
        Response(200, b'{"candidates": []}\n{"candidates": [{"content"'),
    ],
)
async def test_part_of_a_response_of_google_is_unknown(response: Response, callers: Callers) -> None:
    assert isinstance(await callers.call("google", response), OutcomeUnknown)


@pytest.mark.parametrize(
    "response",
    [
        Response(200, B64.encode(), {"content-type": "text/plain"}),
        Response.json(200, {"images": [B64]}),
        Response.json(200, [{"artifacts": [{"base64": B64}]}]),
    ],
)
async def test_picture_of_stability_is_taken_in_any_field(response: Response, callers: Callers) -> None:
    made = await callers.call("stability", response)
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG
    assert made.cost == pytest.approx(0.03)


@pytest.mark.parametrize("document", [{"data": [ODD]}, {"created": 1, "data": [{"jxl": ODD}]}, {"other": ODD}])
async def test_long_text_in_any_field_is_kept(document: object, callers: Callers) -> None:
    for name in ("openai", "google", "stability"):
        error = await callers.call(name, Response.json(200, document))
        assert isinstance(error, Undecodable)
        assert error.path.read_text() == ODD


@pytest.mark.parametrize("name", ["input", "error", "thoughtSignature", "source_image", "mask", "init_images"])
async def test_picture_that_was_sent_is_no_result(name: str, callers: Callers) -> None:
    response = Response.json(200, {"created": 1, "data": [], "meta": {name: f"data:image/png;base64,{B64}"}})
    error = await callers.call("openai", response)
    assert isinstance(error, Retryable)
    assert error.code == "empty_result"


REFUSED: dict[str, object] = {"error": {"message": "No.", "code": "moderation_blocked"}}
QUOTED: list[object] = [
    {**REFUSED, "source_image": B64},
    {**REFUSED, "images": [B64]},
    {"errors": ["No."], "image": B64},
    {"status": "failed", "reason": "nsfw", "image": B64},
    {"data": [], "result": {"state": " Blocked", "image": B64}},
    {"success": False, "output": {"image": B64}},
    {"code": "402", "msg": "No credit.", "url": "https://example.com/billing"},
    {**REFUSED, "url": "https://example.com/billing"},
    {**REFUSED, "data": [], "links": [{"href": "https://example.com/errors"}]},
    {"body": json.dumps({**REFUSED, "image": B64})},
    f'<html><img src="data:image/png;base64,{B64}"></html>',
    {"data": [f'<!DOCTYPE html><img src="data:image/png;base64,{B64}">']},
]


@pytest.mark.parametrize("name", ["openai", "google", "stability"])
@pytest.mark.parametrize("document", QUOTED, ids=range(len(QUOTED)))
async def test_picture_that_a_refusal_quotes_is_no_result(document: object, name: str, callers: Callers) -> None:
    error = await callers.call(name, Response.json(200, document))
    assert isinstance(error, RunError)
    assert error.code not in ("download", "undecodable")


@pytest.mark.parametrize("state", ["succeeded", "completed", "", 200, None])
async def test_response_that_says_that_it_succeeded_has_a_picture(state: object, callers: Callers) -> None:
    document = {"status": state, "error": None, "errors": [], "code": 0, "success": True, "images": [B64]}
    for name in ("openai", "google", "stability"):
        assert isinstance(await callers.call(name, Response.json(200, document)), Generated)
