"""A job in the background whose response is spelled otherwise: its picture is taken, or kept, or waited for."""

import pytest

from daemon.errors import Refused, Retryable, Undecodable
from daemon.providers import Generated, Waiting
from tests.fakes.server import Response
from tests.support.provider_callers import B64, PNG, Callers

CALL = {"type": "image_generation_call", "result": B64}
MARKDOWN = {"type": "message", "content": [{"type": "output_text", "text": f"![fox](data:image/png;base64,{B64})"}]}


def job(status: str | None, *output: object) -> dict[str, object]:
    return {"id": "1", "status": status, "output": list(output)}


@pytest.mark.parametrize(
    "document",
    [
        job("COMPLETED", CALL),
        job("done", CALL),
        job(None, CALL),
        job("completed", MARKDOWN),
        job("completed", {"type": "output_image", "image_url": f"data:image/png;base64,{B64}"}),
        [job("completed", CALL)],
    ],
    ids=range(6),
)
async def test_picture_of_a_job_is_taken_in_any_field(document: object, callers: Callers) -> None:
    made = await callers.call("openai", Response.json(200, document), check=True)
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG


@pytest.mark.parametrize("status", ["in_progress", "QUEUED"])
async def test_picture_of_a_job_at_work_is_not_the_last(status: str, callers: Callers) -> None:
    made = await callers.call("openai", Response.json(200, job(status, CALL)), check=True)
    assert isinstance(made, Waiting)


async def test_failure_of_a_job_is_read_in_capitals(callers: Callers) -> None:
    error = await callers.call("openai", Response.json(200, job("CANCELLED")), check=True)
    assert isinstance(error, Refused)
    assert error.code == "cancelled_there"


async def test_long_text_of_a_job_is_kept(callers: Callers) -> None:
    document = job("completed", {"type": "picture", "jxl": "*" * 1001})
    error = await callers.call("openai", Response.json(200, document), check=True)
    assert isinstance(error, Undecodable)


@pytest.mark.parametrize("name", ["result", "image_url"])
async def test_address_of_a_job_is_followed(name: str, callers: Callers) -> None:
    call = {"type": "image_generation_call", name: f"{callers.api.url}/picture"}
    made = await callers.call("openai", Response.json(200, job("completed", call)), check=True)
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG
    assert made.original_url == f"{callers.api.url}/picture"


async def test_address_of_a_job_is_tried_again_by_the_next_check(callers: Callers) -> None:
    document = job("completed", {**CALL, "result": f"{callers.api.url}/other"})
    error = await callers.call("openai", Response.json(200, document), Response(404), check=True)
    assert isinstance(error, Retryable)
    assert not error.accepted


async def test_private_address_of_a_job_is_refused(callers: Callers) -> None:
    document = job("completed", {**CALL, "result": "http://169.254.169.254/latest"})
    error = await callers.call("openai", Response.json(200, document), check=True)
    assert isinstance(error, Refused)
    assert (error.code, error.charged) == ("download", True)


async def test_address_of_a_submission_is_followed(callers: Callers) -> None:
    document = job("completed", {**CALL, "result": f"{callers.api.url}/picture"})
    made = await callers.call("openai", Response.json(200, document), mode="background")
    assert isinstance(made, Generated)
    assert made.path.read_bytes() == PNG
