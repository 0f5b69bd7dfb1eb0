from datetime import date

import pytest

from daemon.errors import Refused
from daemon.providers import PROVIDERS, create, models, setting
from daemon.providers.catalogue import Resolved, resolve
from daemon.providers.openai.models import estimate
from daemon.settings import Settings

TODAY = date(2026, 11, 24)


def refused(processor: str | None, *, strict: bool = False) -> Refused:
    with pytest.raises(Refused) as caught:
        resolve(processor, strict=strict, today=TODAY)
    return caught.value


@pytest.mark.parametrize("model", ["gpt-image-2", "gpt-image-2.5-flare", "gpt-image-2.6-sunburst"])
def test_a_live_model_is_itself(model: str) -> None:
    assert resolve(f"openai:{model}", strict=True, today=TODAY) == Resolved("openai", model, model)


def test_a_dated_snapshot_is_known_by_its_model() -> None:
    snapshot = "gpt-image-2.5-flare-2026-09-08"

    assert resolve(f"openai:{snapshot}", strict=True, today=TODAY) == Resolved("openai", snapshot, snapshot)


@pytest.mark.parametrize("model", ["dall-e-2", "dall-e-3", "gpt-image-1"])
def test_retired_model_is_replaced_by_its_successor(model: str) -> None:
    found = resolve(f"openai:{model}", strict=False, today=TODAY)

    assert (found.requested, found.model) == (model, "gpt-image-2.5-flare")
    assert found.warning is not None
    assert found.warning.startswith(f"{model} was retired on 2026-")


def test_a_retired_model_is_refused_where_models_are_strict() -> None:
    error = refused("openai:dall-e-3", strict=True)

    assert error.code == "model_retired"
    assert error.message == "The model dall-e-3 was retired on 2026-05-12."
    assert error.hint == "Use openai:gpt-image-2.5-flare."


@pytest.mark.parametrize(
    ("processor", "day", "price"),
    [
        ("google:gemini-2.5-flash-image", date(2027, 3, 15), "is used instead ($0.0336 an image, before $0.0387)."),
        ("google:imagen-4.0-generate-001", TODAY, "is used instead ($0.0336 an image)."),
        ("stability:stable-diffusion-xl", TODAY, "core is used instead ($0.0300 an image)."),
        ("openai:gpt-image-1.5", date(2026, 12, 1), "gpt-image-2.6-sunburst is used instead."),
    ],
)
def test_warning_names_the_price_of_the_successor(processor: str, day: date, price: str) -> None:
    found = resolve(processor, strict=False, today=day)

    assert found.warning is not None
    assert found.warning.endswith(price)


@pytest.mark.parametrize("processor", ["google:imagen-3.0", "google:gemini-3-pro-image-preview", "stability:sd3"])
def test_strictness_holds_for_every_provider(processor: str) -> None:
    successor = resolve(processor, strict=False, today=TODAY)
    error = refused(processor, strict=True)

    assert error.code == "model_retired"
    assert error.hint == f"Use {successor.provider}:{successor.model}."


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_entry_says_where_it_is_from_and_of_which_day(provider: str) -> None:
    for model in models(provider):
        assert model.source
        assert date(2026, 11, 23) <= model.as_of
        assert model.price is None or model.price > 0 or provider == "demo"


def test_model_that_retires_soon_has_a_warning_with_days() -> None:
    found = resolve("openai:gpt-image-1.5", strict=False, today=TODAY)

    assert found.model == "gpt-image-1.5"
    assert found.warning is not None
    assert "in 7 days, on 2026-12-01. Change to openai:gpt-image-2.6-sunburst." in found.warning


def test_on_the_day_of_its_retirement_a_model_is_replaced() -> None:
    assert resolve("openai:gpt-image-1.5", strict=False, today=date(2026, 11, 30)).model == "gpt-image-1.5"
    assert resolve("openai:gpt-image-1.5", strict=False, today=date(2026, 12, 1)).model == "gpt-image-2.6-sunburst"


def test_a_model_nobody_knows_is_passed_on_with_a_guess() -> None:
    found = resolve("openai:gpt-image-2.5-flair", strict=True, today=TODAY)

    assert found.model == "gpt-image-2.5-flair"
    assert found.warning is not None
    assert "Did you mean openai:gpt-image-2.5-flare?" in found.warning


def test_compatible_server_takes_every_model_name() -> None:
    for model in ("dall-e-3", "flux-dev"):
        found = resolve(f"openai:{model}", strict=True, catalogued=False, today=TODAY)
        assert found == Resolved("openai", model, model)


@pytest.mark.parametrize(
    ("base_url", "known"),
    [
        (None, True),
        ("https://api.openai.com/v1", True),
        ("https://eu.api.openai.com/v1", True),
        ("http://127.0.0.1:8080/v1", True),
        ("http://localhost:8080/v1", True),
        ("http://[::1]:8080/v1", True),
        ("https://openai.example.com/v1", False),
        ("https://api.openai.com.example.com/v1", False),
        ("https://notopenai.com/v1", False),
        ("http://10.0.0.7:8080/v1", False),
    ],
)
async def test_the_catalogue_is_about_openai_and_what_stands_in_for_it(base_url: str | None, known: bool) -> None:
    provider = create("openai", Settings(_env_file=None, OPENAI_API_KEY="a key", OPENAI_BASE_URL=base_url))
    assert provider is not None
    assert tuple(provider.models) == (models("openai") if known else ())
    await provider.aclose()


@pytest.mark.parametrize("processor", ["openai", "openai:", " openai: "])
def test_a_provider_alone_means_its_usual_model(processor: str) -> None:
    assert resolve(processor, strict=True, today=TODAY).model == "gpt-image-2.5-flare"


@pytest.mark.parametrize("processor", ["dalle:3", "", None, ":gpt-image-2"])
def test_a_provider_nobody_knows_is_refused(processor: str | None) -> None:
    error = refused(processor)

    assert error.code == "unknown_provider"
    assert "openai" in error.hint


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_the_variable_that_is_said_to_turn_a_provider_on_does(provider: str) -> None:
    value = "1" if provider == "demo" else "http://127.0.0.1"
    assert create(provider, Settings(_env_file=None)) is None
    made = create(provider, Settings(_env_file=None, **{setting(provider): value}))
    assert made is not None
    await made.aclose()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_successor_is_on_offer_and_not_retired(provider: str) -> None:
    for model in models(provider):
        found = resolve(f"{provider}:{model.name}", strict=False, today=date(2100, 1, 1))
        assert found.model in {live.name for live in models(provider) if live.retired is None}


@pytest.mark.parametrize(
    ("model", "size", "quality", "price"),
    [
        ("gpt-image-2", (1024, 1024), "low", 0.0059),
        ("gpt-image-2", (1024, 1024), "medium", 0.0527),
        ("gpt-image-2", (1024, 1024), "high", 0.2107),
        ("gpt-image-2.5-flare", (1024, 1024), "medium", 0.0132),
        ("gpt-image-2.5-sunburst", (1536, 1024), "low", 0.0047),
        ("gpt-image-2.5-sunburst", (1536, 1024), "xhigh", 0.0738),
        ("gpt-image-2.5-flare", (3840, 2160), "high", 0.1001),
        ("gpt-image-2.5-flare", (3840, 2160), "max", 0.4003),
    ],
)
def test_estimates_are_the_published_prices(model: str, size: tuple[int, int], quality: str, price: float) -> None:
    assert estimate(model, size, quality) == pytest.approx(price, abs=5e-5)


@pytest.mark.parametrize(
    ("model", "quality"), [("gpt-image-2.6-flare", "medium"), ("gpt-image-2.5-flare", "auto"), ("flux", "medium")]
)
def test_an_estimate_that_cannot_be_made_is_none(model: str, quality: str) -> None:
    assert estimate(model, (1024, 1024), quality) is None
