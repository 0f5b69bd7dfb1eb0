"""`estimate_cost`, against the estimates of the providers' own code."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest

from daemon.errors import Refused
from daemon.prompt import PromptSpec, Quality
from daemon.providers import Model, Request, create, models
from daemon.providers.catalogue import entry, resolve
from daemon.providers.google import request as google
from daemon.providers.openai import request as openai
from daemon.settings import Settings
from tests.support.postgres import signed_in
from tests.support.protocol import Db, insert_run, new_daemon

pytestmark = pytest.mark.one_postgres


async def publish(db: Db, provider: str, catalogue: Iterable[Model]) -> None:
    """Publish models, as a daemon does."""
    published = [asdict(model) for model in catalogue]
    for model in published:
        model |= {"provider": provider, "model": model.pop("name")}
        model |= {name: str(value) for name, value in model.items() if isinstance(value, date)}
    await db.execute("select image_jobs.publish_models($1, $2)", provider, published)


async def publish_catalogues(db: Db) -> date:
    """Publish the models of both; return today."""
    for provider in ("openai", "google"):
        await publish(db, provider, models(provider))
    today: date = await db.fetchval("select (image_jobs.now() at time zone 'utc')::date")
    return today


def ignore(_: str, *, field: str | None = None, **__: Any) -> None:
    """Drop a warning."""


def estimated(processor: str, spec: dict[str, Any], today: date) -> float | None:
    """USD by the provider's code, for the image alone: previews are not the database's business."""
    found = resolve(processor, strict=False, today=today)
    prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox", **spec}})
    request = Request("run_1", found.model, prompt, Path())
    if found.provider == "google":
        return google.build(request, ignore).estimate
    drawing = openai.draw(request, ignore)
    if drawing.estimate() is None and (drawing.size, drawing.quality) == ((1024, 1024), "medium"):
        known = entry("openai", found.model)
        return known and known.price
    return drawing.estimate()


def requests(today: date) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every model of both catalogues, dated snapshots of OpenAI's, one that is not listed; with every
    quality, every size and ratio that a catalogue names, and large squares."""
    catalogue = [model for provider in ("openai", "google") for model in models(provider)]
    sizes = {size for model in catalogue for size in model.sizes if "x" in size}
    shapes = [{}, *({"size": size} for size in sorted(sizes | {"2048x2048", "4096x4096"}))]
    shapes += [{"aspectRatio": ratio} for ratio in sorted({ratio for model in catalogue for ratio in model.ratios})]
    for provider in ("openai", "google"):
        names = [model.name for model in models(provider)]
        snapshots = [f"{name}-2026-01-31" for name in names if provider == "openai"]
        for name in (*names, *snapshots, "unheard-of"):
            processor = f"{provider}:{name}"
            try:
                resolve(processor, strict=False, today=today)
            except Refused:
                continue
            for quality in (None, *get_args(Quality)):
                for shape in shapes:
                    yield processor, shape if quality is None else {**shape, "quality": quality}


async def test_estimates_are_those_of_the_providers_code(db: Db) -> None:
    today = await publish_catalogues(db)
    asked = list(requests(today))
    async with signed_in(db):
        rows = await db.fetch(
            "select public.estimate_cost(p, s)::float8 as price from unnest($1::text[], $2::jsonb[]) with ordinality"
            " as asked (p, s, n) order by n",
            [processor for processor, _ in asked],
            [spec for _, spec in asked],
        )
    wrong = []
    for (processor, spec), row in zip(asked, rows, strict=True):
        wanted = estimated(processor, spec, today)
        if row["price"] != (None if wanted is None else pytest.approx(wanted, abs=1e-6)):
            wrong.append((processor, spec, row["price"], wanted))
    assert wrong == []


async def test_estimate_is_null_where_nothing_is_known(db: Db) -> None:
    await publish_catalogues(db)
    asked: list[tuple[str | None, Any]] = [
        *((processor, {}) for processor in (None, "", ":", "openai", "openai:flux", "stability:core", "nobody:x")),
        ("google:gemini-3.1-flash-image", {"size": "99999x99999"}),
        ("openai:gpt-image-2", {"quality": "auto"}),
        ("openai:gpt-image-1.5", {"quality": "hd"}),
    ]
    for processor, spec in asked:
        price = await db.fetchval("select public.estimate_cost($1, $2)", processor, spec)
        assert price is None, (processor, spec)


async def test_estimate_reads_any_json(db: Db) -> None:
    await publish_catalogues(db)
    for spec in (None, [], "text", 5, {"size": {"a": 1}}, {"size": "0x0"}, {"size": "1x\n1"}, {"aspectRatio": "0:1"}):
        price = await db.fetchval("select public.estimate_cost('openai:gpt-image-2', $1)", spec)
        assert float(price) == pytest.approx(0.0527, abs=1e-4), spec


async def test_operators_price_is_the_estimate_of_midjourney(db: Db) -> None:
    settings = Settings(_env_file=None, MIDJOURNEY_API_URL="http://127.0.0.1:1", IMAGE_JOBS_MIDJOURNEY_PRICE="0.08")
    provider = create("midjourney", settings)
    assert provider is not None
    await publish(db, "midjourney", provider.models)
    await provider.aclose()
    assert set(await db.fetch("select price::float8 from image_models")) == {(0.08,)}
    await insert_run(db, processor="midjourney:v7", prompt={"aspectRatio": "16:9", "quality": "hd"})
    await (await new_daemon(db, "midjourney")).claim_one()
    assert await db.fetchval("select estimate::float8 from image_jobs.calls") == 0.08
