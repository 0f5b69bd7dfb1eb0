"""Pictures of a private bucket: signed in batches, renewed while the canvas is open, asked for once where refused."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.node import run_script
from tests.support.postgres import ROOT

pytestmark = pytest.mark.timeout(150)


def signed(run: str, end: str, request: int) -> str:
    """Return the address of the first picture, as it was signed by the request of this number."""
    return f"sign/images/w/{run}_1{end}?token=t{request}-600&v=abcd1234"


@pytest.fixture(scope="module")
async def outcomes() -> Any:
    """Run all scenarios of the script, and return what came of each."""
    script = Path(__file__).with_name("store_pictures.mjs")
    return await run_script(script, CANVAS=str(ROOT / "daemon/dev/canvas"))


async def test_nothing_is_asked_of_a_public_bucket(outcomes: Any):
    assert outcomes["a public bucket"] == [0, True]


async def test_a_canvas_is_signed_by_one_request(outcomes: Any):
    image, thumbnail = (f"sign/images/w/job_1_0{end}?token=t1-600&v=abcd1234" for end in (".png", ".thumb.webp"))
    assert outcomes["a canvas"] == [1, 200, image, thumbnail]


async def test_a_large_canvas_is_signed_in_batches(outcomes: Any):
    assert outcomes["a large canvas"] == [True, 1200, 1200]


async def test_signatures_are_renewed_before_they_end(outcomes: Any):
    """Not after five minutes, but after nine, after a sleep of ten hours, and after the clock went back a day."""
    counts, meanwhile, last, paths, holes, problems = outcomes["renewal"]
    assert counts == [1, 2, 2, 3, 4]
    assert (meanwhile, last) == (signed("job_1", ".png", 1), signed("job_1", ".png", 4))
    assert (paths, holes, problems) == (4, 0, [])


async def test_the_old_image_stays_until_the_new_is_signed(outcomes: Any):
    assert outcomes["a new image"] == [signed("job_1", ".png", 1), signed("job_2", ".png", 2), 0]


async def test_a_run_of_previews_is_signed_once(outcomes: Any):
    assert outcomes["previews"] == 1


async def test_a_row_without_addresses_is_signed_by_its_paths(outcomes: Any):
    assert outcomes["a row without addresses"] == "sign/images/w/job_1_1.png?token=t1-600"


async def test_trouble_of_storage_is_told_once(outcomes: Any):
    assert outcomes["Storage in trouble"] == [1, 6, ["The pictures cannot be shown: upstream"]]


async def test_signing_goes_on_when_the_network_is_back(outcomes: Any):
    assert outcomes["no network"] == [1, []]


async def test_a_refusal_to_sign_is_told_once(outcomes: Any):
    assert outcomes["a refusal"] == [1, 2, ["The pictures cannot be shown: jwt expired"]]


async def test_a_missing_picture_is_told_once(outcomes: Any):
    assert outcomes["a picture that is missing"] == [1, 2, ["A picture cannot be shown."], True, None]


async def test_an_address_that_fails_is_signed_with_pauses(outcomes: Any):
    assert outcomes["an address that does not load"] == [[1, 2, 2, 3, 4], 0]


async def test_pictures_of_a_bucket_made_private_are_signed(outcomes: Any):
    paths = [["w/job_1_1.png", "w/job_1_2.png"]]
    public = "public/images/w/job_1_1.png?v=abcd1234"
    assert outcomes["a public bucket that was closed"] == [paths, public, signed("job_1", ".png", 1), 0]


async def test_no_signature_outlives_a_membership(outcomes: Any):
    assert outcomes["signatures after leaving"] == signed("job_1", ".png", 2)


async def test_no_signature_is_written_to_a_node(outcomes: Any):
    assert outcomes["a deleted node that comes back"] == "authenticated/images/w/job_1_1.png?v=abcd1234"


async def test_only_nodes_that_changed_are_new_objects(outcomes: Any):
    assert outcomes["a node that has not changed"] == [True, False]
