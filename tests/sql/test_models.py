"""What daemons publish of their providers' models."""

import json

from tests.sql.protocol import Db


async def publish(db: Db, provider: str, *models: dict[str, object]) -> None:
    await db.execute(
        "select private.publish_models($1, $2::text::jsonb)",
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


async def test_what_was_published_is_replaced_and_other_providers_keep_theirs(db):
    await publish(db, "demo", {"model": "painter"})
    await publish(db, "openai", {"model": "old"}, {"model": "kept"})
    await publish(db, "openai", {"model": "kept", "qualities": ["low", "standard"], "price": None}, {"model": "new"})
    rows = await db.fetch("select provider, model, m.qualities, price from image_models m order by provider, model")
    assert [(*row.values(),) for row in rows][:2] == [
        ("demo", "painter", ["standard", "hd"], rows[0]["price"]),
        ("openai", "kept", ["low", "standard"], None),
    ]
    assert [row["model"] for row in rows] == ["painter", "kept", "new"]


async def test_a_daemon_that_knows_nothing_of_qualities_can_publish(db):
    await db.execute(
        "select private.publish_models('demo', $1::text::jsonb)",
        json.dumps([{"provider": "demo", "model": "painter", **{k: v for k, v in MODEL.items() if k != "qualities"}}]),
    )
    assert await db.fetchval("select m.qualities from image_models m") == []
