"""The short way into the database: it is taken by what is ordinary, and changes nothing of what the long way writes."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.events import Event
from daemon.log import masker
from daemon.queue.plain import plain_json
from daemon.queue.sanitize import sanitize_progress, sanitize_settlement
from daemon.worker.outcomes import Failed, Failure, Parked
from tests.queue.test_base64_rule import token
from tests.support.wiring import completed

WORKFLOW, RUN = "aaaaaaaa-0000-4000-8000-000000000000", "job_1795873114118_015f223101a5"
URL = f"https://example.supabase.co/storage/v1/object/public/images/{WORKFLOW}/{RUN}.png?v=0a1b2c3d"
MASK = masker(["a-password-of-ours", "service/role+key"])
LONG = token(300)

ORDINARY = ["a", " ", "fox", "/", "9", ".", "=", "https://", URL, token(30), token(70)]
HARD = [
    "e-",
    "e+5",
    "64,",
    "data:;base64,",
    "\n",
    '"',
    "\\",
    "狐",
    "\x00",
    "\ud800",
    "sk-",
    "?key=",
    "Bearer ",
    "eyJ",
    LONG,
    f"https://{token(2_041)}",
    f"http://{token(3_493)}",
    f"HTTPS://{'.' * 100}http://{token(1_990)}",
]
TEXTS = st.lists(st.sampled_from(ORDINARY * 10 + HARD), max_size=4).map("".join)
NUMBERS = st.one_of(st.floats(), st.integers(), st.sampled_from([0.04, 1e-40, 1e50, 10**60, 10**401]))
VALUES = st.recursive(
    TEXTS | NUMBERS | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=3,
)
EVENTS = st.builds(
    lambda message, data: Event("generated", message, data=data).to_json(),
    TEXTS,
    st.dictionaries(TEXTS, VALUES, max_size=2),
)
ENTRIES = st.fixed_dictionaries(
    {"id": st.just(RUN), "claim": st.just(1), "events": st.lists(EVENTS, max_size=1)},
    optional={
        "outcome": st.just("retry"),
        "message": TEXTS,
        "payload": st.dictionaries(
            TEXTS | st.sampled_from(["error", "hint", "imageUrl", "details"]), VALUES, max_size=3
        ),
        "provider_job_id": TEXTS,
        "progress": st.integers(-1, 101) | NUMBERS | st.none(),
        "due_in": st.floats() | st.integers(-1, 10**9),
        "if_lost": EVENTS,
    },
)


@settings(max_examples=150, deadline=None)
@given(ENTRIES, st.sampled_from([sanitize_settlement, sanitize_progress]))
def test_the_short_way_writes_what_the_long_way_writes(entry: dict[str, Any], sanitize: Any) -> None:
    text = plain_json(entry, MASK)
    if text is not None:
        assert json.loads(text) == json.loads(json.dumps(sanitize(entry, MASK)))


@pytest.mark.parametrize(
    "outcome",
    [
        completed(URL, events=[Event("generated", "The provider made the image.", data={"cost": 0.04})]),
        Failed(Failure("The provider refused the prompt.", "refused", "Change the prompt.", {"status": 400})),
        Parked(f"job-{WORKFLOW}", 5.0, "The provider is at work.", progress=40),
    ],
    ids=lambda outcome: outcome.name,
)
def test_ordinary_settlements_take_the_short_way(outcome: Any) -> None:
    entry = {**outcome.to_json(), "id": RUN, "claim": 1}
    assert json.loads(plain_json(entry, MASK) or "null") == json.loads(json.dumps(sanitize_settlement(entry, MASK)))


@pytest.mark.parametrize(
    "message",
    [
        f"Of {LONG} {LONG}.",
        f"At https://{token(2_041)}.",
        f"At HTTPS://{'.' * 100}http://{token(1_990)}.",
        "It says a-password-of-ours.",
        "data:image/png;base64,AAAA",
        "a\x00b",
        "狐",
        "word " * 1_000,
    ],
    ids=["base64", "long URL", "URL in a long one", "secret", "data URL", "NUL", "other letters", "long"],
)
def test_whatever_may_be_changed_takes_the_long_way(message: str) -> None:
    assert plain_json({"id": RUN, "claim": 1, "message": message}, MASK) is None
