"""The qualities in image_models are those that the providers are really called with."""

from pathlib import Path
from typing import Any, get_args

import pytest

from daemon.prompt import PromptSpec, Quality
from daemon.providers import Model, Request, models, stability
from daemon.providers.google import request as google_request
from daemon.providers.midjourney import request as midjourney_request
from daemon.providers.openai import request as openai_request

BUILD = {
    "openai": openai_request.build,
    "google": google_request.build,
    "stability": stability.build,
    "midjourney": lambda request, warn: midjourney_request.build(request, None, warn),
}
LIVE = [
    pytest.param(provider, model, id=f"{provider}:{model.name}")
    for provider in BUILD
    for model in models(provider)
    if model.retired is None or model.sizes
    if not model.name.startswith("dall-e")  # retired: its successor is asked
]


def asked(provider: str, model: Model, quality: str) -> tuple[str, bool]:
    """The order for a picture of that quality, and whether it comes with a warning about it."""
    warned: list[str | None] = []

    def warn(_: str, *, field: str | None = None, **data: Any) -> None:
        warned.append(field)

    prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "A fox", "quality": quality}})
    request = Request(run_id="job_1", model=model.name, prompt=prompt, workdir=Path())
    call = BUILD[provider](request, warn)
    return repr(call), "quality" in warned


@pytest.mark.parametrize(("provider", "model"), LIVE)
def test_qualities_of_a_model_are_those_with_an_effect(provider: str, model: Model) -> None:
    offered = model.qualities or ("standard",)
    calls = {quality: asked(provider, model, quality) for quality in offered}
    assert not any(warned for _, warned in calls.values())
    assert len({call for call, _ in calls.values()}) == len(offered)
    assert "standard" in offered

    for other in set(get_args(Quality)) - set(offered) - {"auto"}:
        call, warned = asked(provider, model, other)
        assert warned or call in {each for each, _ in calls.values()}, other


def test_one_quality_is_none_to_choose_from() -> None:
    assert all(len(model.qualities) != 1 for each in LIVE for model in [each.values[1]])
