"""A job of a midjourney-proxy is checked, downloaded and cancelled."""

import json
from typing import Any

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError, Undecodable
from daemon.providers import Generated, Waiting
from daemon.providers.midjourney.addresses import resolved
from tests.fakes.server import Response, size_of
from tests.support.midjourney_provider_harness import Harness


async def test_the_grid_comes_whole_and_is_said_to_be_one(harness: Harness) -> None:
    made = await harness.check(await harness.submit_id())

    assert isinstance(made, Generated)
    assert size_of(made.path.read_bytes()) == (128, 96)
    assert made.grid
    assert made.cost is None
    assert made.data == {"taskId": "1000", "status": "SUCCESS", "finalPrompt": "a red fox --v 7"}
    assert "mj-api-secret" not in harness.api.requests[-1].headers


@pytest.mark.parametrize("price", [None, 0.0, 0.08])
async def test_operators_price_is_published_estimated_and_charged(price: float | None, harness: Harness) -> None:
    if price is not None:
        await harness.set_up(IMAGE_JOBS_MIDJOURNEY_PRICE=str(price))
    made = await harness.check(await harness.submit_id())

    assert isinstance(made, Generated)
    assert made.cost == price
    assert harness.recorder.estimates == [price]
    assert {model.price for model in harness.provider.models} == {price}


async def test_progress_and_the_forming_picture_are_shown(harness: Harness) -> None:
    forming = {"status": "IN_PROGRESS", "progress": "46%", "imageUrl": f"{harness.api.url}/forming.png"}
    harness.api.stages = [{"status": "SUBMITTED", "progress": "0%"}, forming, harness.api.done()]
    job_id = await harness.submit_id()

    assert await harness.check(job_id) == Waiting(0, "Midjourney is drawing")
    assert harness.recorder.previews == []
    assert await harness.check(job_id) == Waiting(46, "Midjourney is drawing")
    assert [size_of(preview) for preview in harness.recorder.previews] == [(32, 32)]
    assert isinstance(await harness.check(job_id), Generated)


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "https://10.0.0.1/a.png", "file:///etc/passwd", "nonsense"])
async def test_a_forming_picture_from_a_bad_address_is_left_out(url: str, harness: Harness) -> None:
    harness.api.stages = [{"status": "IN_PROGRESS", "progress": "46%", "imageUrl": url}]

    assert await harness.check(await harness.submit_id()) == Waiting(46, "Midjourney is drawing")
    assert harness.recorder.previews == []


@pytest.mark.parametrize(
    ("stage", "progress"),
    [
        ({"status": "NOT_START", "progress": ""}, None),
        ({"status": "MODAL", "progress": "0%"}, 0),
        ({"status": "A_NEW_ONE", "progress": "soon"}, None),
        ({"status": None, "progress": None}, None),
        ({"status": "IN_PROGRESS", "progress": "460%"}, 100),
    ],
)
async def test_a_status_that_is_no_end_is_waited_for(
    stage: dict[str, Any], progress: float | None, harness: Harness
) -> None:
    harness.api.stages = [stage]
    waiting = await harness.check(await harness.submit_id())

    assert isinstance(waiting, Waiting)
    assert waiting.progress == progress


@pytest.mark.parametrize(
    ("stage", "kind", "name"),
    [
        ({"status": "FAILURE", "failReason": "Banned prompt detected"}, Refused, "content_policy"),
        ({"status": "FAILURE", "failReason": "Invalid parameter"}, Refused, "invalid_request"),
        ({"status": "FAILURE", "failReason": None}, Refused, "invalid_request"),
        ({"status": "FAILURE", "failReason": "任务超时"}, Retryable, "provider_unavailable"),
        ({"status": "FAILURE", "failReason": "取消任务"}, Refused, "cancelled_there"),
        ({"status": "CANCEL"}, Refused, "cancelled_there"),
    ],
)
async def test_every_end_without_a_picture_has_an_error_of_ours(
    stage: dict[str, Any], kind: type[RunError], name: str, harness: Harness
) -> None:
    harness.api.stages = [stage]
    job_id = await harness.submit_id()
    with pytest.raises(kind) as caught:
        await harness.check(job_id)

    assert caught.value.code == name
    assert caught.value.data["taskId"] == job_id


@pytest.mark.parametrize(
    "response",
    [Response(200), Response(204), Response(404), Response.json(404, {"code": "3", "description": "任务不存在"})],
)
async def test_forgotten_job_is_an_unknown_outcome(response: Response, harness: Harness) -> None:
    job_id = await harness.submit_id()
    harness.api.next(response, response)
    with pytest.raises(OutcomeUnknown):
        await harness.check(job_id)


@pytest.mark.parametrize("response", [Response(200), Response(204), Response(404)])
async def test_a_job_is_forgotten_only_if_said_twice(response: Response, harness: Harness) -> None:
    job_id = await harness.submit_id()
    harness.api.next(response)

    assert isinstance(await harness.check(job_id), Generated)


@pytest.mark.parametrize("envelope", [{"code": 1, "result": ...}, {"code": "1", "message": "ok", "data": ...}])
async def test_a_task_in_an_envelope_is_unwrapped(envelope: dict[str, Any], harness: Harness) -> None:
    job_id = await harness.submit_id()
    task = {"id": job_id, **harness.api.done(), "status": "success"}
    harness.api.next(Response.json(200, {name: task if held is ... else held for name, held in envelope.items()}))

    assert isinstance(await harness.check(job_id), Generated)


@pytest.mark.parametrize(
    ("spelled", "grid"),
    [
        ({"imageUrl": " {url}/grid.png \n"}, True),
        ({"imageUrl": "/grid.png?ex=1"}, True),
        ({"imageUrl": "grid.png"}, True),
        ({"imageUrl": "//{host}/grid.png"}, True),
        ({"imageUrl": None, "imageUrls": [{"url": "{url}/grid.png"}]}, True),
        ({"imageUrl": "", "imageUrls": ["{url}/grid.png"]}, True),
        ({"imageUrls": [None, "{url}/grid.png", "{url}/forming.png"]}, False),
    ],
)
async def test_the_image_is_found_however_its_address_is_spelled(
    spelled: dict[str, Any], *, grid: bool, harness: Harness
) -> None:
    url = harness.api.url
    written = json.dumps(spelled).replace("{url}", url).replace("{host}", url.removeprefix("http://"))
    harness.api.stages = [{"status": "SUCCESS", **json.loads(written)}]
    made = await harness.check(await harness.submit_id())

    assert isinstance(made, Generated)
    assert made.grid == grid
    assert made.original_url is not None
    assert made.original_url.startswith(f"{url}/grid.png")


@pytest.mark.parametrize("address", ["nonsense", "javascript:alert(1).png", "http:/grid.png"])
async def test_a_text_that_is_no_picture_at_all_is_kept(address: str, harness: Harness) -> None:
    harness.api.stages = [{"status": "SUCCESS", "imageUrl": address}]
    with pytest.raises(Undecodable) as caught:
        await harness.check(await harness.submit_id())

    assert caught.value.path.exists()


@pytest.mark.parametrize(
    ("address", "full"),
    [
        ("/image/1.png", "https://mj.example.com:8443/image/1.png"),
        ("image/1.png", "https://mj.example.com:8443/proxy/image/1.png"),
        ("//cdn.example.com/1.png", "https://cdn.example.com/1.png"),
        ("//[::1", None),
        ("data:image/png;base64,AAA.", None),
        ("a text with blanks.", None),
        ("/9j/4AAQ.", None),
        ("/" * 3_000, None),
    ],
)
def test_relative_address_is_that_of_the_proxy(address: str, full: str | None) -> None:
    assert resolved(address, "https://mj.example.com:8443/proxy/mj") == full


def test_over_http_only_the_proxy_itself_is_asked() -> None:
    assert resolved("/1.png", "http://127.0.0.1:8080") == "http://127.0.0.1:8080/1.png"
    assert resolved("//127.0.0.1/1.png", "http://127.0.0.1:8080") == "https://127.0.0.1/1.png"


@pytest.mark.parametrize(
    "response",
    [
        *(Response(502), Response(429), Response(200, b"<html>"), Response(cut=0)),
        *(Response(status) for status in (400, 402, 405, 410, 413, 422, 451)),
        *(Response.json(status, {"code": 4, "description": "No."}) for status in (400, 403)),
        Response(404, b"<html>Not found</html>"),
        Response.json(404, {"detail": "Not Found"}),
        Response(302, headers={"location": "/login"}),
        *(Response(200, odd) for odd in (b"null", b"[]", b"{}", b'"busy"', b'{"error": "busy"}')),
        *(Response.json(200, {"code": code, "description": "系统异常", "result": {}}) for code in (-1, 1)),
    ],
)
async def test_failed_check_submits_nothing(response: Response, harness: Harness) -> None:
    job_id = await harness.submit_id()
    harness.api.next(response)
    with pytest.raises(Retryable) as caught:
        await harness.check(job_id)

    assert not caught.value.accepted


async def test_success_without_an_image_is_asked_again(harness: Harness) -> None:
    harness.api.stages = [{"status": "SUCCESS", "imageUrl": None}, harness.api.done()]
    job_id = await harness.submit_id()
    with pytest.raises(Retryable) as caught:
        await harness.check(job_id)

    assert (caught.value.code, caught.value.accepted) == ("empty_result", False)
    assert isinstance(await harness.check(job_id), Generated)


async def test_failed_download_submits_nothing(harness: Harness) -> None:
    job_id = await harness.submit_id()
    known = Response.json(200, {"id": job_id, **harness.api.done()})
    harness.api.next(known, Response(503))
    with pytest.raises(Retryable) as caught:
        await harness.check(job_id)

    assert not caught.value.accepted


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://192.168.1.1/grid.png", "192.168.1.1 is not a public address."),
        ("https://169.254.169.254/latest/meta-data/", "169.254.169.254 is not a public address."),
        ("https://[fd00:ec2::254]/", "fd00:ec2::254 is not a public address."),
        ("https://[64:ff9b::a00:1]/", "64:ff9b::a00:1 is not a public address."),
        ("https://0x7f.1/grid.png", "its URL has no valid host name."),
        ("http://93.184.215.14/grid.png", "its URL is not https."),
        ("https://93.184.215.14:6379/", "port 6379 of 93.184.215.14 is not open to it."),
        ("file:///etc/passwd", "its URL is not https."),
    ],
)
async def test_a_picture_at_a_bad_address_is_refused(url: str, reason: str, harness: Harness) -> None:
    harness.api.stages = [{"status": "SUCCESS", "imageUrl": url}]
    job_id = await harness.submit_id()
    with pytest.raises(Refused) as caught:
        await harness.check(job_id)

    assert (caught.value.code, caught.value.message) == ("download", f"Cannot download the image: {reason}")


@pytest.mark.parametrize(
    ("response", "code", "reason"),
    [
        (Response(302, headers={"location": "https://169.254.169.254/"}), "download", "is not a public address."),
        (Response(302, headers={"location": "http://example.com/"}), "download", "its URL is not https."),
        (Response(302, headers={"location": "/grid.png"}), "download", "there were more than 3 redirects."),
        (Response(200, bytes(60_000), {"content-type": "image/png"}), "download", "it is larger than 0.05 MB."),
    ],
)
async def test_broken_and_too_large_pictures_are_refused(
    response: Response, code: str, reason: str, harness: Harness
) -> None:
    await harness.set_up(IMAGE_JOBS_MAX_IMAGE_BYTES="50000")
    job_id = await harness.submit_id()
    harness.api.next(Response.json(200, {"id": job_id, **harness.api.done()}), *[response] * 4)
    with pytest.raises(Refused) as caught:
        await harness.check(job_id)

    assert caught.value.code == code
    assert caught.value.message.endswith(reason)
    assert caught.value.hint
    assert [path.name for path in harness.folder.iterdir()] in ([], ["grid"])


@pytest.mark.parametrize("can_cancel", [True, False])
async def test_a_job_is_cancelled_where_the_proxy_can_do_that(*, can_cancel: bool, harness: Harness) -> None:
    harness.api.can_cancel = can_cancel
    job_id = await harness.submit_id()
    await harness.provider.cancel(job_id)
    await harness.provider.cancel("an order that has never been")

    assert (harness.api.tasks[job_id]["status"] == "FAILURE") == can_cancel
