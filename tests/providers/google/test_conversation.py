"""The conversation that made an image is sent when Google refines it, with its signatures."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from daemon.providers import Conversational, Generated
from tests.fakes.google_api import KEY, SIGNATURE, THOUGHT, GoogleAPI, answered, decoded, encoded, error
from tests.fakes.server import picture
from tests.support.provider_harness import ProviderHarness

NEWEST = "gemini-nano-banana-2.1"
PRO = "gemini-3-pro-image"
Harness = ProviderHarness[GoogleAPI]


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[GoogleAPI]:
    async with GoogleAPI() as api:
        yield api


@pytest.fixture
async def harness(api: GoogleAPI, tmp_path: Path) -> AsyncIterator[Harness]:
    api.reset()
    harness = Harness("google", NEWEST, KEY, api, tmp_path)
    yield harness
    await harness.provider.aclose()


@pytest.fixture
async def first(harness: Harness) -> tuple[bytes, Path]:
    """A picture, and the conversation that made it."""
    return kept(harness, await harness.make())


def kept(harness: Harness, made: Generated) -> tuple[bytes, Path]:
    """Return both as storage does."""
    assert made.conversation is not None
    conversation = harness.folder / "previous.json"
    made.conversation.rename(conversation)
    return made.path.read_bytes(), conversation


async def test_previous_conversation_is_sent_with_its_signature(harness: Harness, first: tuple[bytes, Path]) -> None:
    image, conversation = first
    await harness.make(previous=image, conversation=conversation, basePrompt="now at night")

    asked, response, now = harness.api.requests[-1].fields["contents"]
    assert asked == {"parts": [{"text": "a red fox"}], "role": "user"}
    assert now == {"parts": [{"text": "now at night"}], "role": "user"}
    assert response["role"] == "model"
    (part,) = response["parts"]
    assert decoded(part["inlineData"]["data"]) == image
    assert decoded(part["thoughtSignature"]) == THOUGHT
    assert harness.recorder.warnings == []


async def test_text_beside_the_picture_is_sent_in_its_place(harness: Harness) -> None:
    harness.api.says = "Here is your fox."
    image, conversation = kept(harness, await harness.make())
    await harness.make(previous=image, conversation=conversation)

    text, drawn = harness.api.requests[-1].fields["contents"][1]["parts"]
    assert text == {"text": "Here is your fox."}
    assert decoded(drawn["thoughtSignature"]) == THOUGHT


async def test_a_refined_picture_can_be_refined_again(harness: Harness, first: tuple[bytes, Path]) -> None:
    image, conversation = first
    harness.api.drawn, harness.api.thought = picture((640, 480)), b"another thought"
    again, conversation = kept(
        harness, await harness.make(previous=image, conversation=conversation, basePrompt="now at night")
    )
    await harness.make(previous=again, conversation=conversation, basePrompt="now in winter")

    asked, response, _ = harness.api.requests[-1].fields["contents"]
    assert asked["parts"] == [{"text": "now at night"}]
    assert decoded(response["parts"][0]["thoughtSignature"]) == b"another thought"


async def test_reported_request_has_no_signature_in_it(harness: Harness, first: tuple[bytes, Path]) -> None:
    image, conversation = first
    await harness.make(previous=image, conversation=conversation)

    reported = harness.recorder.requests[-1]
    assert [content["role"] for content in reported["contents"]] == ["user", "model", "user"]
    assert reported["contents"][1]["parts"] == [
        {"inlineData": f"image/png, {len(image)} bytes", "thoughtSignature": f"{len(THOUGHT)} bytes"}
    ]
    assert SIGNATURE[:40] not in json.dumps(harness.recorder.requests)


async def test_request_without_a_conversation_is_plain(harness: Harness) -> None:
    await harness.make(previous=picture())
    (content,) = harness.api.requests[0].fields["contents"]
    assert [sorted(part) for part in content["parts"]] == [["text"], ["inlineData"]]


async def test_conversation_of_another_model_is_left_out(harness: Harness, first: tuple[bytes, Path]) -> None:
    image, conversation = first
    await harness.make(PRO, previous=image, conversation=conversation)
    assert harness.api.roles() == ["user"]


async def test_conversation_of_another_picture_is_left_out(harness: Harness, first: tuple[bytes, Path]) -> None:
    _, conversation = first
    await harness.make(previous=picture((32, 32)), conversation=conversation)
    assert harness.api.roles() == ["user"]


@pytest.mark.parametrize(
    "text", ["", "no JSON", "[]", "null", "{}", '{"model": 1}', '{"model": "%s", "image": "%s", "response": [1]}']
)
async def test_broken_conversation_is_left_out(harness: Harness, first: tuple[bytes, Path], text: str) -> None:
    image, conversation = first
    found = json.loads(conversation.read_text())
    conversation.write_text(text.replace("%s", found["model"], 1).replace("%s", found["image"], 1))
    await harness.make(previous=image, conversation=conversation)
    assert harness.api.roles() == ["user"]


async def test_refused_signature_is_left_out_and_paid_once(harness: Harness, first: tuple[bytes, Path]) -> None:
    image, conversation = first
    harness.api.forgetful = True
    made = await harness.make(previous=image, conversation=conversation)

    assert made.cost is not None
    assert [len(call.fields["contents"]) for call in harness.api.requests] == [1, 3, 1]
    assert len(harness.recorder.requests) == 3
    ((field, message),) = harness.recorder.warnings
    assert field == "previousImage"
    assert "Thought signature" in message


async def test_other_refusals_are_not_repeated(harness: Harness, first: tuple[bytes, Path]) -> None:
    image, conversation = first
    harness.api.next(error(400, "INVALID_ARGUMENT", "The prompt is too long."))
    await harness.fail(previous=image, conversation=conversation)
    assert len(harness.api.requests) == 2


async def test_too_large_conversation_is_left_out_with_a_warning(harness: Harness) -> None:
    harness.api.drawn, harness.api.thought = picture() + bytes(9_000_000), bytes(7_000_000)
    image, conversation = kept(harness, await harness.make())
    await harness.make(previous=image, conversation=conversation)

    assert harness.api.roles() == ["user"]
    ((field, message),) = harness.recorder.warnings
    assert field == "previousImage"
    assert "too large" in message


async def test_large_conversation_is_sent(harness: Harness) -> None:
    harness.api.drawn, harness.api.thought = picture() + bytes(5_000_000), bytes(range(256)) * 36_000
    image, conversation = kept(harness, await harness.make())
    assert isinstance(harness.provider, Conversational)
    assert conversation.stat().st_size <= harness.provider.max_conversation_bytes
    await harness.make(previous=image, conversation=conversation)
    assert harness.api.roles() == ["user", "model", "user"]
    assert len(json.dumps(harness.api.requests[-1].fields)) < 20_000_000


async def test_signatures_that_are_too_large_are_not_kept(harness: Harness) -> None:
    harness.api.thought = bytes(10_000_001)
    assert (await harness.make()).conversation is None
    assert harness.recorder.warned == {"context"}


async def test_full_disk_loses_the_conversation_and_no_picture(harness: Harness) -> None:
    (harness.folder / "conversation.json").mkdir()
    made = await harness.make()
    assert made.conversation is None
    assert made.path.read_bytes()
    assert harness.recorder.warned == {"context"}


async def test_without_a_signature_nothing_is_kept(harness: Harness) -> None:
    harness.api.thought = None
    assert (await harness.make()).conversation is None
    assert harness.recorder.warnings == []


async def test_several_pictures_have_no_conversation(harness: Harness) -> None:
    part = {"inlineData": {"mimeType": "image/png", "data": encoded(picture())}, "thoughtSignature": SIGNATURE}
    harness.api.next(answered(part, part))
    assert (await harness.make()).conversation is None
