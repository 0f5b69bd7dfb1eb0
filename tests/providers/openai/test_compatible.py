"""Servers with OpenAI's Images API that are not OpenAI's."""

from daemon.errors import Refused
from tests.fakes.openai_api import (
    document,
)
from tests.support.openai_images_harness import Harness, size_of


async def test_compatible_server_gets_base64_and_no_stream(harness: Harness) -> None:
    harness.api.compatible = True

    made = await harness.make("flux-dev", size="512x512")

    assert made.cost is None
    assert harness.api.requests[0].fields == {
        "model": "flux-dev",
        "prompt": "a red fox",
        "size": "512x512",
        "response_format": "b64_json",
    }


async def test_compatible_server_may_ignore_the_stream(harness: Harness) -> None:
    harness.api.compatible = True

    made = await harness.make("gpt-image-2")

    assert size_of(made.path.read_bytes()) == (1024, 1024)


async def test_picture_url_is_fetched_without_the_key(harness: Harness) -> None:
    harness.api.compatible = harness.api.only_urls = True

    made = await harness.make("flux-dev")

    assert size_of(made.path.read_bytes()) == (64, 64)
    assert made.original_url == f"{harness.api.url}/files/picture.png?secret=1"
    assert made.revised_prompt == "As it was drawn"
    assert harness.api.downloads == 1


async def test_picture_at_a_private_address_is_not_fetched(harness: Harness) -> None:
    harness.api.compatible = True
    harness.api.next(document(b'{"data": [{"url": "http://169.254.169.254/latest?token=1"}]}'))

    error = await harness.fail(model="flux-dev")

    assert isinstance(error, Refused)
    assert error.code == "download"
    assert error.data["url"] == "http://169.254.169.254/latest"
