import hashlib
import hmac
import json
import struct
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError
from daemon.prompt import PromptSpec
from daemon.providers import Deferred, Generated, Request, Submitted, Waiting, create, models
from daemon.providers.vendor import LONGEST_ID
from daemon.settings import Settings
from tests.fakes.midjourney_api import COLOURS, KEY, MidjourneyAPI, code
from tests.fakes.reporter import Recorder
from tests.fakes.server import Answer, picture, size_of
from tests.postgres import free_port

STATE = "run_1:7"
SECRET = "a webhook secret of the tests"
ANON_KEY = "an anon key+"
HOOKED = {
    "SUPABASE_URL": "https://example.supabase.co/",
    "SUPABASE_ANON_KEY": ANON_KEY,
    "WEBHOOK_SECRET_MIDJOURNEY": f"{SECRET},the secret before that one",
}
OURS = "https://example.supabase.co/rest/v1/rpc/webhook_midjourney?apikey="
THEIRS = "https://93.184.215.14/hook?token=theirs"


@dataclass
class Studio:
    """The provider, the fake it talks to, and what it reports."""

    api: MidjourneyAPI
    folder: Path
    recorder: Recorder = field(default_factory=Recorder)

    def __post_init__(self) -> None:
        self.provider = self._create(self.api.url)

    def _create(self, url: str, key: str = KEY, **settings: str) -> Deferred:
        made = create(
            "midjourney", Settings(_env_file=None, MIDJOURNEY_API_URL=url, MIDJOURNEY_API_KEY=key, **settings)
        )
        assert isinstance(made, Deferred)
        return made

    async def set_up(self, url: str | None = None, key: str = KEY, **settings: str) -> None:
        """Goes on with a provider that is set up in another way."""
        await self.provider.aclose()
        self.provider = self._create(url or self.api.url, key, **settings)

    def request(
        self,
        model: str = "v7",
        *,
        attempt: int = 1,
        previous: bytes | None = None,
        hook: str | None = None,
        **spec: Any,
    ) -> Request:
        """Asks for red foxes; whatever else is named belongs to the promptSpec."""
        image = None
        if previous is not None:
            image = self.folder / "previous"
            image.write_bytes(previous)
        prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox", **spec}})
        metadata = {} if hook is None else {"webhookUrl": hook}
        return Request("run_1", model, prompt, self.folder, attempt, image, metadata, ticket=7)

    async def submit(self, model: str = "v7", **options: Any) -> Submitted:
        """Submits."""
        made = await self.provider.generate(self.request(model, **options), self.recorder)
        assert isinstance(made, Submitted)
        return made

    async def order(self, model: str = "v7", **options: Any) -> str:
        """Submits; answers the order's id."""
        return (await self.submit(model, **options)).job_id

    async def check(self, job_id: str) -> Generated | Waiting:
        """Asks once."""
        return await self.provider.check(job_id, self.request(), self.recorder)

    async def fail(self, **options: Any) -> RunError:
        """Submits in vain; gives the error."""
        with pytest.raises(RunError) as caught:
            await self.order(**options)
        assert KEY not in str(vars(caught.value))
        return caught.value

    @property
    def line(self) -> str:
        """The prompt of the one order that was made."""
        (call,) = self.api.orders
        return str(call.fields["prompt"])


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[MidjourneyAPI]:
    async with MidjourneyAPI() as api:
        yield api


@pytest.fixture
async def studio(api: MidjourneyAPI, tmp_path: Path) -> AsyncIterator[Studio]:
    api.reset()
    studio = Studio(api, tmp_path)
    yield studio
    await studio.provider.aclose()


def colour_of(path: Path) -> str:
    with Image.open(path) as image:
        (found,) = image.getcolors() or ()
    return next(name for name in COLOURS if Image.new("RGB", (1, 1), name).getpixel((0, 0)) == found[1])


def test_without_an_address_there_is_no_provider() -> None:
    assert create("midjourney", Settings(_env_file=None, MIDJOURNEY_API_URL="", MIDJOURNEY_API_KEY=KEY)) is None


def test_no_model_has_a_price_as_a_subscription_pays() -> None:
    assert [(model.name, model.price) for model in models("midjourney")] == [
        ("v7", None),
        ("v6", None),
        ("niji-6", None),
    ]


@pytest.mark.parametrize(
    ("model", "flag", "bot"),
    [
        ("v7", "--v 7", "MID_JOURNEY"),
        ("v6", "--v 6", "MID_JOURNEY"),
        ("niji-6", "--niji 6", "NIJI_JOURNEY"),
        ("v8.1", "--v 8.1", "MID_JOURNEY"),
    ],
)
async def test_an_order_names_the_version_the_bot_and_the_run(model: str, flag: str, bot: str, studio: Studio) -> None:
    job_id = await studio.order(model, styleModifiers=["watercolour"])

    assert job_id == "1000"
    (call,) = studio.api.requests
    assert call.fields == {
        "botType": bot,
        "prompt": f"a red fox, watercolour {flag}",
        "base64Array": [],
        "state": STATE,
    }
    assert studio.recorder.requests == [{"endpoint": "mj/submit/imagine", **call.fields}]
    assert studio.recorder.estimates == [None]
    assert studio.recorder.warnings == []


@pytest.mark.parametrize("model", ["v7 --repeat 4", "7", "v", "dall-e-3"])
async def test_what_cannot_be_a_version_does_not_get_into_the_prompt(model: str, studio: Studio) -> None:
    error = await studio.fail(model=model)

    assert isinstance(error, Refused)
    assert error.code == "unknown_model"
    assert studio.api.requests == []


@pytest.mark.parametrize(
    ("spec", "flags", "warned"),
    [
        ({}, "", set()),
        ({"size": "1024x1024"}, "", set()),
        ({"size": "1792x1024"}, "--ar 7:4 ", {"size"}),
        ({"size": "512x512"}, "", {"size"}),
        ({"aspectRatio": "16:9"}, "--ar 16:9 ", set()),
        ({"aspectRatio": "8:1"}, "--ar 8:1 ", set()),
        ({"size": "1024x1024", "aspectRatio": "16:9"}, "", {"aspectRatio"}),
        ({"seed": 0}, "--seed 0 ", set()),
        ({"seed": 4_294_967_295}, "--seed 4294967295 ", set()),
        ({"seed": 4_294_967_300}, "--seed 4 ", {"seed"}),
        ({"negativePrompt": "text, dogs"}, "--no text, dogs ", set()),
        ({"negativePrompt": "text --v 5"}, "--no text ", {"negativePrompt"}),
        ({"negativePrompt": "--v 5"}, "", {"negativePrompt"}),
        ({"quality": "hd"}, "", {"quality"}),
        ({"quality": "auto"}, "", set()),
    ],
)
async def test_every_field_becomes_a_flag_or_a_warning(
    spec: dict[str, Any], flags: str, warned: set[str], studio: Studio
) -> None:
    await studio.order(**spec)

    assert studio.line == f"a red fox {flags}--v 7"
    assert studio.recorder.warned == warned


@pytest.mark.parametrize(
    ("prompt", "line", "warned"),
    [
        ("a fox --stylize 50 --chaos 10", "a fox --stylize 50 --chaos 10", False),
        ("a fox --s 50 --w 1 --stylize 70", "a fox --stylize 70 --weird 1", False),
        ("a fox --style raw --tile", "a fox --style raw --tile", False),
        ("a fox --stylize 50 in the snow", "a fox in the snow --stylize 50", False),
        ("a fox --ar 16:9", "a fox", True),
        ("a fox --AR 16:9 --weird 3", "a fox --weird 3", True),
        ("a fox --v 5 --repeat 10 --seed 1", "a fox", True),
        ("a fox --stylize 50000", "a fox", True),
        ("a fox --style https://example.com/a.png", "a fox", True),
        ("a fox --no dogs, cats", "a fox", True),
        ("a fox\n--ar 2:1", "a fox", True),
        ("a fox \N{EM DASH}repeat 4", "a fox \N{EM DASH} repeat 4", False),
        ("a well--known fox", "a well-- known fox", False),
        ("a {red, blue} fox", "a (red, blue) fox", True),
    ],
)
async def test_flags_in_a_prompt_pass_only_if_they_are_allowed(
    prompt: str, line: str, *, warned: bool, studio: Studio
) -> None:
    await studio.order(basePrompt=prompt)

    assert studio.line == f"{line} --v 7"
    assert studio.recorder.warned == ({"basePrompt"} if warned else set())


async def test_a_flag_in_a_style_modifier_takes_nothing_else_with_it(studio: Studio) -> None:
    await studio.order(styleModifiers=["--fast", "watercolour --ar 2:1", "soft light"])

    assert studio.line == "a red fox, watercolour, soft light --v 7"
    assert studio.recorder.warned == {"styleModifiers"}


async def test_a_prompt_of_nothing_but_flags_is_refused(studio: Studio) -> None:
    error = await studio.fail(basePrompt="--repeat 40")

    assert (error.code, error.message) == ("invalid_request", "Nothing is left of the prompt without its flags.")
    assert "basePrompt" in error.hint
    assert studio.api.requests == []


async def test_a_previous_image_is_an_example_and_that_is_said(studio: Studio) -> None:
    image = picture(kind="JPEG")
    await studio.order(previous=image)

    (call,) = studio.api.orders
    (url,) = call.fields["base64Array"]
    assert url.startswith("data:image/jpeg;base64,")
    assert studio.recorder.warned == {"previousImage"}
    assert studio.recorder.requests[0]["base64Array"] == [f"image/jpeg, {len(image)} bytes"]


async def test_a_previous_image_that_discord_would_not_take_is_refused(studio: Studio) -> None:
    error = await studio.fail(previous=bytes(10 * 1024 * 1024 + 1))

    assert error.code == "too_large"
    assert studio.api.requests == []


@pytest.mark.parametrize("number", [1, 21, 22])
async def test_an_order_that_is_accepted_queued_or_there_already_is_an_order(number: int, studio: Studio) -> None:
    studio.api.next(code(number, "排队中", result="42"))

    assert await studio.order() == "42"


@pytest.mark.parametrize(
    ("answer", "kind", "name"),
    [
        (code(24, "可能包含敏感词", properties={"bannedWord": "gore"}), Refused, "content_policy"),
        (code(4, "校验错误"), Refused, "invalid_request"),
        (code(3, "无可用的账号实例"), Retryable, "provider_unavailable"),
        (code(9, "系统异常"), Retryable, "provider_unavailable"),
        (code(23, "队列已满"), Retryable, "rate_limited"),
        (code(1, "no id"), OutcomeUnknown, "outcome_unknown"),
        (code(1, "endless id", result="1" * (LONGEST_ID + 1)), OutcomeUnknown, "outcome_unknown"),
        (code(1, "id with NUL", result="1\0"), OutcomeUnknown, "outcome_unknown"),
        (code(77, "new"), OutcomeUnknown, "outcome_unknown"),
        (Answer(200), OutcomeUnknown, "outcome_unknown"),
        (Answer(200, b"<html>"), OutcomeUnknown, "outcome_unknown"),
        (Answer.json(200, [1]), OutcomeUnknown, "outcome_unknown"),
        (Answer(404), Refused, "not_found"),
        (Answer(502), Retryable, "provider_unavailable"),
    ],
)
async def test_every_answer_to_an_order_has_an_error_of_ours(
    answer: Answer, kind: type[RunError], name: str, studio: Studio
) -> None:
    studio.api.next(answer)
    error = await studio.fail()

    assert (type(error), error.code) == (kind, name)
    assert len(studio.api.orders) == 1


async def test_a_full_queue_costs_no_attempt_and_closes_the_proxy_for_a_moment(studio: Studio) -> None:
    studio.api.next(code(23, "队列已满"))
    error = await studio.fail()

    assert isinstance(error, Retryable)
    assert (error.accepted, error.blocks, error.retry_in) == (False, "provider", timedelta(seconds=15))


async def test_a_banned_word_is_named(studio: Studio) -> None:
    studio.api.next(code(24, "可能包含敏感词", properties={"bannedWord": "gore"}))
    error = await studio.fail()

    assert "gore" in error.message
    assert error.data["categories"] == ["gore"]


async def test_a_wrong_secret_is_final(studio: Studio) -> None:
    await studio.set_up(key="another secret")
    error = await studio.fail()

    assert (error.code, isinstance(error, Refused)) == ("authentication", True)
    assert "MIDJOURNEY_API_KEY" in error.hint


async def test_where_nothing_listens_nothing_was_ordered(studio: Studio) -> None:
    await studio.set_up(f"http://127.0.0.1:{free_port()}")
    error = await studio.fail()

    assert isinstance(error, Retryable)
    assert not error.accepted
    assert "MIDJOURNEY_API_URL" in error.hint


async def test_silence_after_an_order_was_sent_is_an_unknown_outcome_and_it_is_found_again(studio: Studio) -> None:
    studio.api.mute = True
    await studio.set_up(IMAGE_JOBS_RUN_TIMEOUT="0.3")
    error = await studio.fail()

    assert isinstance(error, OutcomeUnknown)
    assert "in time" in error.message
    assert await studio.order(attempt=2) == "1000"
    assert len(studio.api.orders) == 1


async def test_the_address_may_end_with_the_prefix_of_all_paths(studio: Studio) -> None:
    await studio.set_up(f"{studio.api.url}/mj/")

    assert await studio.order() == "1000"


async def test_an_order_whose_answer_was_lost_is_found_again_and_not_made_twice(studio: Studio) -> None:
    studio.api.known("999", status="SUCCESS", imageUrl="https://example.com/a.png", state="run_1:6")
    studio.api.cut_off = True
    assert isinstance(await studio.fail(), OutcomeUnknown)

    assert await studio.order(attempt=2) == "1001"
    assert len(studio.api.orders) == 1
    assert len(studio.recorder.requests) == 1


@pytest.mark.parametrize("status", ["FAILURE", "CANCEL", "SUCCESS"])
async def test_an_order_that_leads_to_no_picture_is_made_anew(status: str, studio: Studio) -> None:
    studio.api.known("999", status=status, state=STATE)

    assert await studio.order(attempt=2) == "1001"


@pytest.mark.parametrize(
    "answer", [Answer(502), Answer(200, b"<html>"), Answer(headers={"content-length": "9"}, cut=0)]
)
async def test_as_long_as_nobody_knows_whether_it_was_ordered_it_is_not_ordered(answer: Answer, studio: Studio) -> None:
    studio.api.next(answer)
    error = await studio.fail(attempt=2)

    assert isinstance(error, Retryable)
    assert not error.accepted
    assert studio.api.orders == []


def signed(name: str, secret: str = SECRET) -> str:
    return f"{name}.{hmac.new(secret.encode(), name.encode(), hashlib.sha256).hexdigest()}"


async def test_with_a_secret_an_order_names_our_receiver_and_is_signed(studio: Studio) -> None:
    await studio.set_up(**HOOKED)
    assert (await studio.submit()).webhook

    (call,) = studio.api.orders
    assert (call.fields["state"], call.fields["notifyHook"]) == (signed(STATE), f"{OURS}an%20anon%20key%2B")
    (written,) = studio.recorder.requests
    assert written == {
        "endpoint": "mj/submit/imagine",
        **call.fields,
        "state": f"{STATE}.***",
        "notifyHook": f"{OURS}***",
    }


@pytest.mark.parametrize("missing", HOOKED)
async def test_without_secret_or_address_there_is_no_hook(missing: str, studio: Studio) -> None:
    await studio.set_up(**{name: value for name, value in HOOKED.items() if name != missing})
    assert not (await studio.submit()).webhook

    (call,) = studio.api.orders
    assert call.fields["state"] == STATE
    assert "notifyHook" not in call.fields


@pytest.mark.parametrize("settings", [{}, HOOKED])
async def test_a_run_may_name_another_hook_which_gets_no_token_of_ours(
    settings: dict[str, str], studio: Studio
) -> None:
    await studio.set_up(**settings)
    assert not (await studio.submit(hook=THEIRS)).webhook

    (call,) = studio.api.orders
    assert (call.fields["state"], call.fields["notifyHook"]) == (STATE, THEIRS)
    assert studio.recorder.requests == [{"endpoint": "mj/submit/imagine", **call.fields}]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.com/hook", "its URL is not https."),
        ("ftp://example.com/hook", "its URL is not https."),
        ("example.com", "its URL is not https."),
        ("https://user:pass@example.com/", "its URL has a user name or password in it."),
        ("https://127.0.0.1/hook", "127.0.0.1 is not a public address."),
        ("https://169.254.169.254/latest", "169.254.169.254 is not a public address."),
        ("https://[fd00:ec2::254]/", "fd00:ec2::254 is not a public address."),
        ("https://2130706433/", "its URL has no valid host name."),
        ("https://localhost/", "localhost is not a public address."),
        ("https://93.184.215.14:22/", "port 22 of 93.184.215.14 is not open to it."),
        ("https://[::1", "its URL is malformed."),
    ],
)
async def test_a_hook_that_is_not_public_is_refused_before_anything_is_ordered(
    url: str, reason: str, studio: Studio
) -> None:
    error = await studio.fail(hook=url)

    assert (type(error), error.code) == (Refused, "invalid_request")
    assert error.message == f"metadata.webhookUrl cannot be used: {reason}"
    assert "https" in error.hint
    assert studio.api.requests == []
    assert studio.recorder.requests == []


async def test_not_even_the_proxys_own_address_is_open_to_a_runs_hook(studio: Studio) -> None:
    assert isinstance(await studio.fail(hook=f"{studio.api.url}/mj/submit/imagine"), Refused)
    assert studio.api.requests == []


@pytest.mark.parametrize(
    ("state", "heard"),
    [(signed(STATE), True), (signed(STATE, "the secret before that one"), False), (STATE, False)],
)
async def test_an_order_is_found_again_whatever_key_signed_it(state: str, *, heard: bool, studio: Studio) -> None:
    await studio.set_up(**HOOKED)
    studio.api.known("999", status="IN_PROGRESS", state=state)
    studio.api.known("998", status="IN_PROGRESS", state=signed("run_1:70"))
    found = await studio.submit(attempt=2)

    assert (found.job_id, found.webhook) == ("999", heard)
    assert studio.api.orders == []


async def test_a_webhook_is_posted_as_the_proxys_own_task(studio: Studio) -> None:
    await studio.set_up(**{**HOOKED, "SUPABASE_URL": studio.api.url})
    job_id = await studio.order()
    await studio.api.happen(job_id, status="IN_PROGRESS", progress="46%")

    posted = studio.api.requests[-1]
    assert posted.path == "/rest/v1/rpc/webhook_midjourney"
    assert (posted.fields["id"], posted.fields["state"]) == (job_id, signed(STATE))
    assert SECRET not in json.dumps(posted.fields)


async def test_the_grid_comes_whole_and_in_quarters(studio: Studio) -> None:
    made = await studio.check(await studio.order())

    assert isinstance(made, Generated)
    assert size_of(made.path.read_bytes()) == (128, 96)
    assert [size_of(path.read_bytes()) for path in made.extra] == [(64, 48)] * 4
    assert [colour_of(path) for path in made.extra] == list(COLOURS)
    assert made.cost is None
    assert made.data == {"taskId": "1000", "status": "SUCCESS", "finalPrompt": "a red fox --v 7"}
    assert "mj-api-secret" not in studio.api.requests[-1].headers


async def test_progress_and_the_forming_picture_are_shown(studio: Studio) -> None:
    forming = {"status": "IN_PROGRESS", "progress": "46%", "imageUrl": f"{studio.api.url}/forming.png"}
    studio.api.stages = [{"status": "SUBMITTED", "progress": "0%"}, forming, studio.api.done()]
    job_id = await studio.order()

    assert await studio.check(job_id) == Waiting(0, "Midjourney is drawing")
    assert studio.recorder.previews == []
    assert await studio.check(job_id) == Waiting(46, "Midjourney is drawing")
    assert [size_of(preview) for preview in studio.recorder.previews] == [(32, 32)]
    assert isinstance(await studio.check(job_id), Generated)


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "https://10.0.0.1/a.png", "file:///etc/passwd", "nonsense"])
async def test_a_forming_picture_from_a_bad_address_is_left_out(url: str, studio: Studio) -> None:
    studio.api.stages = [{"status": "IN_PROGRESS", "progress": "46%", "imageUrl": url}]

    assert await studio.check(await studio.order()) == Waiting(46, "Midjourney is drawing")
    assert studio.recorder.previews == []


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
    stage: dict[str, Any], progress: float | None, studio: Studio
) -> None:
    studio.api.stages = [stage]
    waiting = await studio.check(await studio.order())

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
        ({"status": "SUCCESS", "imageUrl": None}, Retryable, "empty_result"),
    ],
)
async def test_every_end_without_a_picture_has_an_error_of_ours(
    stage: dict[str, Any], kind: type[RunError], name: str, studio: Studio
) -> None:
    studio.api.stages = [stage]
    job_id = await studio.order()
    with pytest.raises(kind) as caught:
        await studio.check(job_id)

    assert caught.value.code == name
    assert caught.value.data["taskId"] == job_id


@pytest.mark.parametrize("answer", [Answer(200), Answer(204), Answer(404), Answer.json(200, None)])
async def test_an_order_that_the_proxy_forgot_may_have_been_paid_for(answer: Answer, studio: Studio) -> None:
    job_id = await studio.order()
    studio.api.next(answer)
    with pytest.raises(OutcomeUnknown):
        await studio.check(job_id)


@pytest.mark.parametrize("answer", [Answer(502), Answer(429), Answer(200, b"<html>"), Answer(cut=0)])
async def test_trouble_with_asking_does_not_order_anew(answer: Answer, studio: Studio) -> None:
    job_id = await studio.order()
    studio.api.next(answer)
    with pytest.raises(Retryable) as caught:
        await studio.check(job_id)

    assert not caught.value.accepted


@pytest.mark.parametrize("answer", [Answer(503), Answer(200, b"no picture", {"content-type": "image/png"})])
async def test_trouble_with_the_download_does_not_order_anew(answer: Answer, studio: Studio) -> None:
    job_id = await studio.order()
    known = Answer.json(200, {"id": job_id, **studio.api.done()})
    studio.api.next(known, answer)
    with pytest.raises(Retryable) as caught:
        await studio.check(job_id)

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
async def test_a_picture_at_a_bad_address_is_refused(url: str, reason: str, studio: Studio) -> None:
    studio.api.stages = [{"status": "SUCCESS", "imageUrl": url}]
    job_id = await studio.order()
    with pytest.raises(Refused) as caught:
        await studio.check(job_id)

    assert (caught.value.code, caught.value.message) == ("download", f"Cannot download the image: {reason}")


def bomb() -> bytes:
    """A small file that says it is a picture of 2.5 thousand million pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize(
    ("answer", "code", "reason"),
    [
        (Answer(302, headers={"location": "https://169.254.169.254/"}), "download", "is not a public address."),
        (Answer(302, headers={"location": "http://example.com/"}), "download", "its URL is not https."),
        (Answer(302, headers={"location": "/grid.png"}), "download", "there were more than 3 redirects."),
        (Answer(200, b"<svg/>", {"content-type": "text/html"}), "download", "is not an image."),
        (Answer(200, bytes(60_000), {"content-type": "image/png"}), "download", "it is larger than 0.05 MB."),
        (Answer(200, bomb(), {"content-type": "image/png"}), "image_too_large", "the limit is 100.0 million."),
    ],
)
async def test_what_is_no_picture_of_a_usual_size_is_refused(
    answer: Answer, code: str, reason: str, studio: Studio
) -> None:
    await studio.set_up(IMAGE_JOBS_MAX_IMAGE_BYTES="50000")
    job_id = await studio.order()
    studio.api.next(Answer.json(200, {"id": job_id, **studio.api.done()}), *[answer] * 4)
    with pytest.raises(Refused) as caught:
        await studio.check(job_id)

    assert caught.value.code == code
    assert caught.value.message.endswith(reason)
    assert caught.value.hint
    assert [path.name for path in studio.folder.iterdir()] in ([], ["grid"])


@pytest.mark.parametrize("can_cancel", [True, False])
async def test_an_order_is_cancelled_where_the_proxy_can_do_that(*, can_cancel: bool, studio: Studio) -> None:
    studio.api.can_cancel = can_cancel
    job_id = await studio.order()
    await studio.provider.cancel(job_id)
    await studio.provider.cancel("an order that has never been")

    assert (studio.api.tasks[job_id]["status"] == "FAILURE") == can_cancel
