"""Whatever a provider's server sends, its call ends with a picture or a `RunError`, by the real SDKs over HTTP."""

import base64
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError, Undecodable
from daemon.prompt import PromptSpec
from daemon.providers import Generated, Request, Submitted, Waiting
from daemon.providers.openai.models import settle, settle_mainline
from tests.fakes.google_api import answered, encoded
from tests.fakes.server import Response, picture
from tests.support.postgres import free_port
from tests.support.provider_callers import B64, MODELS, PNG, AnyAPI, Callers
from tests.support.reporter import Recorder

FEW = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def images(**item: object) -> Response:
    return Response.json(200, {"created": 1, "data": [item]})


@pytest.mark.parametrize(
    "response",
    [
        images(b64_json=f"data:image/png;base64,{B64}"),
        images(url=f"data:image/png;base64,{B64}"),
        images(b64_json=B64.rstrip("=")),
        images(b64_json="\r\n".join(B64[start : start + 76] for start in range(0, len(B64), 76))),
        Response(200, json.dumps({"data": [{"b64_json": B64}]}).replace("=", "\\u003d").encode()),
        images(b64_json="***", url=f"data:;base64,{B64}"),
        Response.json(200, {"data": {"b64_json": B64}}),
        Response(200, PNG, {"content-type": "application/octet-stream"}),
        Response(200, gzip.compress(PNG)),
        Response(200, b"data: " + json.dumps({"type": "image_generation.completed", "b64_json": B64}).encode()),
        Response(200, b"\xef\xbb\xbfevent: image_edit.completed\rdata: " + json.dumps({"b64_json": B64}).encode()),
        images(b64_json=B64, revised_prompt=5),
        Response.json(200, {"data": [{"b64_json": B64}], "usage": []}),
        Response.json(200, {"data": [{"b64_json": B64}], "usage": {"output_tokens": "many"}}),
    ],
)
async def test_picture_of_openai_is_read_however_it_is_spelled(response: Response, callers: Callers) -> None:
    made = await callers.call("openai", response)
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG
    assert made.cost is None


async def test_address_counts_where_the_picture_is_empty(callers: Callers) -> None:
    made = await callers.call("openai", images(b64_json="", url=f"{callers.api.url}/picture"))
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG


@pytest.mark.parametrize("first", [Response(404), Response(503), Response(200, b"<html>Wait</html>")])
async def test_address_that_is_empty_for_a_moment_costs_one_call(first: Response, callers: Callers) -> None:
    made = await callers.call("openai", images(url=f"{callers.api.url}/other"), first)
    assert isinstance(made, RunError)
    assert (made.code, made.charged) == ("download", True)
    assert "previousImage" not in made.hint


@pytest.mark.parametrize(
    "response",
    [
        Response(200, PNG, {"content-type": "application/octet-stream"}),
        Response(200, PNG),
        Response.json(200, {"image": B64, "finish_reason": "SUCCESS", "seed": 7}),
        Response.json(200, {"artifacts": [{"base64": B64, "finishReason": "SUCCESS", "seed": 7}]}),
        Response(201, PNG, {"content-type": "text/html"}),
    ],
)
async def test_picture_of_stability_is_one_by_its_first_bytes(response: Response, callers: Callers) -> None:
    made = await callers.call("stability", response)
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG
    assert made.cost == pytest.approx(0.03)


async def test_picture_of_googles_thoughts_is_better_than_none(callers: Callers) -> None:
    thought, last = picture((32, 32)), picture((48, 48))
    parts: list[dict[str, Any]] = [
        {"inlineData": {"data": encoded(image)}, "thought": True} for image in (PNG, thought)
    ]

    made = await callers.call("google", answered(*parts))
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == thought

    made = await callers.call("google", answered({"inlineData": {"data": encoded(last)}}, *parts))
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == last


def events(*documents: object) -> Response:
    data = [text if isinstance(text, str) else json.dumps(text) for text in documents]
    return Response(200, "".join(f"data: {text}\n\n" for text in data).encode())


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("openai", images(b64_json=base64.b64encode(b"\xff\x0a JPEG XL").decode())),
        ("openai", Response(200, b"data: " + json.dumps({"type": "x.completed", "b64_json": "/wog"}).encode())),
        ("google", answered({"inlineData": {"data": base64.b64encode(b"\xff\x0a JPEG XL").decode()}})),
        ("stability", Response(200, b"\xff\x0a JPEG XL")),
        ("stability", Response.json(200, {"image": "/wogSlBFRyBYTA=="})),
    ],
)
async def test_picture_that_cannot_be_decoded_is_kept(name: str, response: Response, callers: Callers) -> None:
    error = await callers.call(name, response)
    assert isinstance(error, Undecodable)
    assert (error.code, error.charged, error.status) == ("undecodable", True, 200)
    assert error.path.read_bytes().startswith(b"\xff\x0a ")


ODD = "*" * 70_000
"""No base64, and long enough for a file."""
DONE = {"type": "x.done", "b64_json": ODD}


@pytest.mark.parametrize(
    "response",
    [
        events({"b64_json": ODD}),
        events(DONE, "[DONE]"),
        events(DONE, {"type": "x.partial_image", "b64_json": B64}),
        events(DONE, {"type": "x.completed", "usage": {"input_tokens": 1}}),
        replace(events(DONE, {"type": "x.ended"}), cut=70_100),
    ],
)
async def test_picture_of_any_event_that_cannot_be_decoded_is_kept(response: Response, callers: Callers) -> None:
    error = await callers.call("openai", response)
    assert isinstance(error, Undecodable)
    assert (error.code, error.charged) == ("undecodable", True)
    assert error.path.read_text() == ODD


@pytest.mark.parametrize(
    "response",
    [
        events({"type": "x.done", "b64_json": B64}, {"type": "x.ended", "usage": {"input_tokens": 1}}),
        replace(events({"type": "x.done", "b64_json": B64}, {"type": "x.ended", "b64_json": ODD}), cut=len(B64) + 100),
    ],
)
async def test_picture_outlives_the_rest_of_its_stream(response: Response, callers: Callers) -> None:
    made = await callers.call("openai", response)
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x", B64, "completed", "9" * 30]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "data",
                        "b64_json",
                        "url",
                        "usage",
                        "type",
                        "error",
                        "status",
                        "output",
                        "result",
                        "id",
                        "tool_usage",
                    ),
                    *(
                        "candidates",
                        "content",
                        "parts",
                        "inlineData",
                        "usageMetadata",
                        "promptFeedback",
                        "safetyRatings",
                    ),
                    *(
                        "finishReason",
                        "candidatesTokensDetails",
                        "image",
                        "artifacts",
                        "name",
                        "errors",
                        "seed",
                        "code",
                    ),
                    *(
                        "description",
                        "properties",
                        "imageUrl",
                        "progress",
                        "failReason",
                        "metadata",
                        "input_tokens_details",
                    ),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=15,
)
SSE = st.lists(
    st.sampled_from([b"data: ", b"event: x.completed", b"\n", b"\r", b"\n\n", b": ", b"id", b"[DONE]", b"\xef\xbb\xbf"])
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=5),
    max_size=12,
).map(b"".join)
BODIES = JSON.map(lambda value: json.dumps(value).encode()) | SSE | st.binary(max_size=100)


@FEW
@given(name=st.sampled_from(sorted(MODELS)), body=BODIES, status=st.sampled_from([200, 200, 200, 201, 204, 400, 502]))
async def test_any_response_ends_with_a_class(name: str, body: bytes, status: int, callers: Callers) -> None:
    """Any JSON with the names of all APIs, any events, any bytes, as a success or an error of each provider."""
    made = await callers.call(name, Response(status, b"" if status == 204 else body))
    assert isinstance(made, Generated | Submitted | Waiting | OutcomeUnknown | Refused | Retryable | Undecodable)
    if isinstance(made, RunError):
        assert made.status == status


@settings(FEW, max_examples=40)
@given(document=JSON, name=st.sampled_from(["openai", "midjourney"]))
async def test_any_response_to_a_check_ends_with_a_class(document: object, name: str, callers: Callers) -> None:
    """Any JSON with the names of all APIs, as the response to a check of a job."""
    made = await callers.call(name, Response.json(200, document), check=True)
    assert isinstance(made, Generated | Waiting | OutcomeUnknown | Refused | Retryable | Undecodable)


@given(usage=JSON | st.dictionaries(st.sampled_from(["input_tokens", "output_tokens", "input_tokens_details"]), JSON))
def test_cost_never_raises_and_is_never_absurd(usage: object) -> None:
    """Any JSON in the place of usage."""
    for cost in (settle("gpt-image-2", usage), settle_mainline("gpt-6-luna", usage)):
        assert cost is None or 0 <= cost < 10_000


class Held(Recorder):
    """A reporter whose claim is lost."""

    def submitted(self, request: Any, *, estimate: float | None = None, deferred: bool = False) -> None:
        raise Retryable("The claim is lost.", code="claim_lost", hint="None.", accepted=False)


@pytest.mark.parametrize("name", MODELS)
async def test_request_whose_claim_is_lost_never_leaves(name: str, callers: Callers) -> None:
    callers.api.reset()
    request = Request(
        "run_1", MODELS[name], PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox"}}), callers.folder
    )

    with pytest.raises(Retryable) as caught:
        await callers.providers[name].generate(request, Held())

    assert caught.value.code == "claim_lost"
    assert callers.api.requests == []


@pytest.mark.parametrize("name", MODELS)
async def test_request_that_finds_no_server_is_not_reported(name: str, tmp_path: Path) -> None:
    closed = AnyAPI()
    closed.url = f"http://127.0.0.1:{free_port()}"
    callers = Callers(closed, tmp_path)
    recorder = Recorder()
    request = Request("run_1", MODELS[name], PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox"}}), tmp_path)

    with pytest.raises(Retryable) as caught:
        await callers.providers[name].generate(request, recorder)

    assert (caught.value.code, caught.value.accepted, caught.value.status) == ("unreachable", False, None)
    assert recorder.requests == []
    for provider in callers.providers.values():
        await provider.aclose()
