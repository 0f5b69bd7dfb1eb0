"""The base64 rule in Python against the database's own, and what breaks it."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from daemon.queue.base64_rule import ALLOWED, break_data_urls, count, has_data_url, shorten_tokens
from tests.support.linear import assert_linear
from tests.support.postgres import Cluster, connect

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"


def token(length: int) -> str:
    return (PNG * (length // len(PNG) + 1))[:length]


PIECES = st.one_of(
    st.sampled_from(
        ["data:", "DATA:", ";base64,", ";BaSe64,", ";ba\u017fe64,", ",", '"', "\\", "\\u", "\n", "\x01", "\x7f"]
    ),
    st.sampled_from(
        ["=", "==", "+", "-", "_", "/", "http://", "HTTPS://a.io/", "\u00a0", "\u3000", " ", "<", ">", "狐"]
    ),
    st.sampled_from([1, 30, 58, 59, 60, 61, 300, 1_022, 1_024, 1_025, 2_030, 2_048, 2_049]).map(token),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=5),
)
TEXTS = st.lists(PIECES, max_size=9).map("".join)
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for key, inner in value.items():
                yield key
                yield from texts(inner)
        case list():
            for inner in value:
                yield from texts(inner)
        case _:
            yield json.dumps(value)


async def has_base64(postgres: Cluster, values: list[Any]) -> list[bool]:
    """Ask the database about all of them at once."""
    async with postgres.database() as dsn:
        connection = await connect(dsn)
        verdicts = await connection.fetchval(
            "select array_agg(image_jobs.has_base64(v.value) order by v.place) "
            "from jsonb_array_elements($1) with ordinality as v (value, place)",
            values,
        )
        await connection.close()
    return verdicts


async def test_the_rule_is_the_databases(postgres: Cluster) -> None:
    """Domain: JSON whose texts and names are made of tokens around each limit, URLs, data URLs, escapes and any character."""
    found: list[Any] = []

    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(VALUES)
    @example([token(1_024), "https://" + token(2_041)])
    @example(["x" * 70 + "_" + "y" * 70 + "+" + "z" * 60, "data:\n,data:;base64,"])
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    verdicts = await has_base64(postgres, found)
    assert {True, False} == set(verdicts)
    for value, verdict in zip(found, verdicts, strict=True):
        ours = any(map(has_data_url, texts(value))) or sum(map(count, texts(value))) > ALLOWED
        assert ours is verdict, json.dumps(value)


async def test_no_broken_text_is_refused(postgres: Cluster) -> None:
    """Domain: texts as above. Those that the rule allows stay as they are."""
    found: list[tuple[str, str]] = []

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(TEXTS)
    def collect(text: str) -> None:
        found.append((text, shorten_tokens(break_data_urls(text), ALLOWED)))

    collect()
    before = await has_base64(postgres, [text for text, _ in found])
    after = await has_base64(postgres, [broken for _, broken in found])
    assert not any(after)
    assert all(text == broken for (text, broken), refused in zip(found, before, strict=True) if not refused)


def test_words_around_a_file_are_kept() -> None:
    said = f"Expected a 'data:image/png;base64,{token(5_000)}==' or a URL, and `DATA:;BASE64,` is none."
    assert break_data_urls(said) == ("Expected a 'data:image/png; base64,…' or a URL, and `DATA:; BASE64,` is none.")
    assert shorten_tokens(f"a {token(100)} b {token(90)} c", 120) == f"a {token(100)} b {token(24)}… c"


SLOW: dict[str, Callable[[int], str]] = {
    "data URLs that never end": lambda size: "data:" * (size // 5),
    "ends of data URLs": lambda size: ";base64," * (size // 8),
    "one long token": lambda size: "a" * size,
    "tokens that are a little short": lambda size: ("a" * 59 + " ") * (size // 60),
    "alphabets that alternate": lambda size: ("a" * 58 + "+" + "a" * 58 + "_") * (size // 118),
    "short URLs": lambda size: "http://x " * (size // 9),
    "beginnings of URLs": lambda size: "http://" * (size // 7),
    "padding": lambda size: ("a" * 60 + "=") * (size // 61),
}


@pytest.mark.parametrize("text", SLOW)
def test_the_rule_takes_linear_time(text: str) -> None:
    assert_linear(lambda long: shorten_tokens(break_data_urls(long), ALLOWED), SLOW[text])
