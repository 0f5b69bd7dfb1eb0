"""Models as daemons publish them."""

import json
from dataclasses import asdict
from datetime import date

import pytest

from daemon.errors import Refused
from daemon.providers import PROVIDERS, models
from daemon.providers.catalogue import resolve
from tests.support.protocol import Db, move_clock


async def publish(db: Db, provider: str, *models: dict[str, object]) -> None:
    await db.execute(
        "select image_jobs.publish_models($1, $2::text::jsonb)",
        provider,
        json.dumps([{"provider": provider, **MODEL, **model} for model in models]),
    )


MODEL = {
    "sizes": ["1024x1024"],
    "ratios": [],
    "qualities": ["standard", "hd"],
    "seed": True,
    "negative_prompt": False,
    "previous_image": False,
    "previews": False,
    "price": 0.04,
}


async def test_publishing_replaces_one_providers_models_alone(db):
    await publish(db, "demo", {"model": "painter"})
    await publish(db, "openai", {"model": "old"}, {"model": "kept"})
    await publish(db, "openai", {"model": "kept", "qualities": ["low", "standard"], "price": None}, {"model": "new"})
    rows = await db.fetch("select provider, model, qualities, price from image_models order by provider, model")
    assert [(*row.values(),) for row in rows][:2] == [
        ("demo", "painter", ["standard", "hd"], rows[0]["price"]),
        ("openai", "kept", ["low", "standard"], None),
    ]
    assert [row["model"] for row in rows] == ["painter", "kept", "new"]


async def test_models_without_qualities_can_be_published(db):
    await db.execute(
        "select image_jobs.publish_models('demo', $1::text::jsonb)",
        json.dumps([{"provider": "demo", "model": "painter", **{k: v for k, v in MODEL.items() if k != "qualities"}}]),
    )
    assert await db.fetchval("select qualities from image_models") == []


@pytest.mark.parametrize("days", [0, 3650])
async def test_sql_and_catalogue_agree_on_the_drawing_model(db: Db, days: int) -> None:
    """Every name of every catalogue, its snapshot, one that is not listed; today and when all are retired."""
    await move_clock(db, f"{days} days")
    today = await db.fetchval("select (image_jobs.now() at time zone 'utc')::date")
    for provider in PROVIDERS:
        listed = [{**asdict(model), "model": model.name} for model in models(provider)]
        await db.execute(
            "select image_jobs.publish_models($1, $2)",
            provider,
            [
                {"provider": provider, **{k: str(v) if isinstance(v, date) else v for k, v in each.items()}}
                for each in listed
            ],
        )
        for model in (*models(provider), None):
            for name in (f"{model.name}", f"{model.name}-2026-01-31") if model else ("unheard-of",):
                try:
                    wanted = resolve(f"{provider}:{name}", strict=False, today=today).model
                except Refused:
                    wanted = name
                assert await db.fetchval("select image_jobs.drawing_model($1)", f"{provider}:{name}") == wanted
