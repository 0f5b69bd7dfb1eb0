"""The turn before goes along when a picture of Google's is refined, with the signature that came with it."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from daemon.providers import Generated, Recalling
from tests.fakes.google_api import KEY, SIGNATURE, THOUGHT, GoogleAPI, answered, decoded, encoded, error
from tests.fakes.server import picture
from tests.provider_studio import ProviderStudio

NEWEST = "gemini-nano-banana-2.1"
PRO = "gemini-3-pro-image"
Studio = ProviderStudio[GoogleAPI]


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[GoogleAPI]:
    async with GoogleAPI() as api:
        yield api


@pytest.fixture
async def studio(api: GoogleAPI, tmp_path: Path) -> AsyncIterator[Studio]:
    api.reset()
    studio = Studio("google", NEWEST, KEY, api, tmp_path)
    yield studio
    await studio.provider.aclose()


@pytest.fixture
async def first(studio: Studio) -> tuple[bytes, Path]:
    """A picture, and the turn that was kept of it."""
    return kept(studio, await studio.make())


def kept(studio: Studio, made: Generated) -> tuple[bytes, Path]:
    """As storage would give them back."""
    assert made.context is not None
    context = studio.folder / "previous.json"
    made.context.rename(context)
    return made.path.read_bytes(), context


async def test_the_turn_before_goes_along_with_its_signature_byte_for_byte(
    studio: Studio, first: tuple[bytes, Path]
) -> None:
    image, context = first
    await studio.make(previous=image, context=context, basePrompt="now at night")

    asked, answer, now = studio.api.requests[-1].fields["contents"]
    assert asked == {"parts": [{"text": "a red fox"}], "role": "user"}
    assert now == {"parts": [{"text": "now at night"}], "role": "user"}
    assert answer["role"] == "model"
    (part,) = answer["parts"]
    assert decoded(part["inlineData"]["data"]) == image
    assert decoded(part["thoughtSignature"]) == THOUGHT
    assert studio.recorder.warnings == []


async def test_what_the_model_said_beside_the_picture_goes_along_in_its_place(studio: Studio) -> None:
    studio.api.says = "Here is your fox."
    image, context = kept(studio, await studio.make())
    await studio.make(previous=image, context=context)

    text, drawn = studio.api.requests[-1].fields["contents"][1]["parts"]
    assert text == {"text": "Here is your fox."}
    assert decoded(drawn["thoughtSignature"]) == THOUGHT


async def test_a_refined_picture_can_be_refined_again(studio: Studio, first: tuple[bytes, Path]) -> None:
    image, context = first
    studio.api.drawn, studio.api.thought = picture((640, 480)), b"another thought"
    again, context = kept(studio, await studio.make(previous=image, context=context, basePrompt="now at night"))
    await studio.make(previous=again, context=context, basePrompt="now in winter")

    asked, answer, _ = studio.api.requests[-1].fields["contents"]
    assert asked["parts"] == [{"text": "now at night"}]
    assert decoded(answer["parts"][0]["thoughtSignature"]) == b"another thought"


async def test_the_reported_request_says_that_a_signature_was_sent_and_not_which(
    studio: Studio, first: tuple[bytes, Path]
) -> None:
    image, context = first
    await studio.make(previous=image, context=context)

    reported = studio.recorder.requests[-1]
    assert [content["role"] for content in reported["contents"]] == ["user", "model", "user"]
    assert reported["contents"][1]["parts"] == [
        {"inlineData": f"image/png, {len(image)} bytes", "thoughtSignature": f"{len(THOUGHT)} bytes"}
    ]
    assert SIGNATURE[:40] not in json.dumps(studio.recorder.requests)


async def test_without_a_turn_it_is_the_plain_request(studio: Studio) -> None:
    await studio.make(previous=picture())
    (content,) = studio.api.requests[0].fields["contents"]
    assert [sorted(part) for part in content["parts"]] == [["text"], ["inlineData"]]


async def test_a_turn_of_another_model_is_left_out(studio: Studio, first: tuple[bytes, Path]) -> None:
    image, context = first
    await studio.make(PRO, previous=image, context=context)
    assert studio.api.turns() == ["user"]


async def test_a_turn_of_another_picture_is_left_out(studio: Studio, first: tuple[bytes, Path]) -> None:
    _, context = first
    await studio.make(previous=picture((32, 32)), context=context)
    assert studio.api.turns() == ["user"]


@pytest.mark.parametrize(
    "text", ["", "no JSON", "[]", "null", "{}", '{"model": 1}', '{"model": "%s", "picture": "%s", "answered": [1]}']
)
async def test_what_is_no_turn_is_left_out(studio: Studio, first: tuple[bytes, Path], text: str) -> None:
    image, context = first
    found = json.loads(context.read_text())
    context.write_text(text.replace("%s", found["model"], 1).replace("%s", found["picture"], 1))
    await studio.make(previous=image, context=context)
    assert studio.api.turns() == ["user"]


async def test_a_signature_that_google_does_not_take_is_left_out_and_nothing_is_paid_twice(
    studio: Studio, first: tuple[bytes, Path]
) -> None:
    image, context = first
    studio.api.forgetful = True
    made = await studio.make(previous=image, context=context)

    assert made.cost is not None
    assert [len(call.fields["contents"]) for call in studio.api.requests] == [1, 3, 1]
    assert len(studio.recorder.requests) == 3
    ((field, message),) = studio.recorder.warnings
    assert field == "previousImage"
    assert "Thought signature" in message


async def test_another_refusal_is_not_asked_again(studio: Studio, first: tuple[bytes, Path]) -> None:
    image, context = first
    studio.api.next(error(400, "INVALID_ARGUMENT", "The prompt is too long."))
    await studio.fail(previous=image, context=context)
    assert len(studio.api.requests) == 2


async def test_a_turn_that_makes_the_request_too_large_is_left_out_with_a_warning(studio: Studio) -> None:
    studio.api.drawn, studio.api.thought = picture() + bytes(9_000_000), bytes(7_000_000)
    image, context = kept(studio, await studio.make())
    await studio.make(previous=image, context=context)

    assert studio.api.turns() == ["user"]
    ((field, message),) = studio.recorder.warnings
    assert field == "previousImage"
    assert "too large" in message


async def test_a_large_turn_goes_along(studio: Studio) -> None:
    studio.api.drawn, studio.api.thought = picture() + bytes(5_000_000), bytes(range(256)) * 36_000
    image, context = kept(studio, await studio.make())
    assert isinstance(studio.provider, Recalling)
    assert context.stat().st_size <= studio.provider.largest_context
    await studio.make(previous=image, context=context)
    assert studio.api.turns() == ["user", "model", "user"]
    assert len(json.dumps(studio.api.requests[-1].fields)) < 20_000_000


async def test_signatures_that_are_too_large_are_not_kept(studio: Studio) -> None:
    studio.api.thought = bytes(10_000_001)
    assert (await studio.make()).context is None
    assert studio.recorder.warned == {"context"}


async def test_a_turn_that_the_disk_does_not_take_costs_no_picture(studio: Studio) -> None:
    (studio.folder / "turn.json").mkdir()
    made = await studio.make()
    assert made.context is None
    assert made.path.read_bytes()
    assert studio.recorder.warned == {"context"}


async def test_without_a_signature_nothing_is_kept(studio: Studio) -> None:
    studio.api.thought = None
    assert (await studio.make()).context is None
    assert studio.recorder.warnings == []


async def test_of_several_pictures_no_turn_is_kept(studio: Studio) -> None:
    part = {"inlineData": {"mimeType": "image/png", "data": encoded(picture())}, "thoughtSignature": SIGNATURE}
    studio.api.next(answered(part, part))
    assert (await studio.make()).context is None
