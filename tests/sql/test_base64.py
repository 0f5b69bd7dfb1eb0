"""The base64 rule, exactly, against an oracle that shares no code with it."""

import json
import string
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.postgres import Cluster, connect
from tests.support.protocol import Daemon, Db, events, insert_node, new_daemon
from tests.support.runs import WORKFLOW, insert_run

pytestmark = pytest.mark.every_postgres

STANDARD = frozenset(string.ascii_letters + string.digits + "+/")
URL_SAFE = frozenset(string.ascii_letters + string.digits + "-_")
LONGEST_URL = 2_048
SHORTEST_TOKEN = 60
ALLOWED = 1_024

# Columns of ours that have no such constraint, and why. There is none.
WITHOUT: dict[tuple[str, str], str] = {}

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"


# The oracle: the sentences of the contract, character by character.


def texts(value: Any) -> Iterator[str]:
    """Yield every key, string and number in a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)


def is_data_url(text: str) -> bool:
    """Return whether a text has a `data:…;base64,`: nothing but the media type, which has no comma, in between."""
    text = text.lower()
    ends = [place for place in range(len(text)) if text.startswith(";base64,", place)]
    starts = [place for place in range(len(text)) if text.startswith("data:", place)]
    return any(start + 5 <= end and "," not in text[start + 5 : end] for start in starts for end in ends)


def uncounted(text: str) -> Iterator[str]:
    """Return the text without its URLs of up to 2,048 characters."""
    place = begun = 0
    lowered = text.lower()
    while place < len(text):
        scheme = next((name for name in ("https://", "http://") if lowered.startswith(name, place)), None)
        end = place + len(scheme) if scheme else place
        while scheme and end < len(text) and not text[end].isspace() and text[end] not in '"<>\\' and text[end] >= " ":
            end += 1
        if scheme and end > place + len(scheme):
            yield text[begun:place]
            if end - place > LONGEST_URL:
                yield text[place:end]
            place = begun = end
        else:
            place += 1
    yield text[begun:]


def counted(text: str) -> int:
    """Count the characters of its tokens, padding included."""
    total = place = 0
    while place < len(text):
        length = 0
        for alphabet in (STANDARD, URL_SAFE):
            end = place
            while end < len(text) and text[end] in alphabet:
                end += 1
            if end - place >= SHORTEST_TOKEN:
                padding = len(text[end : end + 2]) - len(text[end : end + 2].lstrip("="))
                length = max(length, end - place + padding)
        total += length
        place += length or 1
    return total


def has_base64(value: Any) -> bool:
    """Apply the rule."""
    strings = list(texts(value))
    if any(is_data_url(text) for text in strings):
        return True
    return sum(counted(piece) for text in strings for piece in uncounted(text)) > ALLOWED


# Exact boundaries


def token(length: int) -> str:
    return (PNG * (length // len(PNG) + 1))[:length]


def url(length: int) -> str:
    return ("https://a.io/" + token(length))[:length]


BOUNDARIES: list[tuple[str, Any, bool]] = [
    ("nothing", None, False),
    ("an empty object", {}, False),
    ("a data URL", "data:image/png;base64,AA==", True),
    ("a data URL without a type", "data:;base64,", True),
    ("a data URL in capitals", "DATA:IMAGE/PNG;BASE64,AA", True),
    ("a data URL with parameters", "data:image/svg+xml;charset=utf-8;base64,AA", True),
    ("a data URL in the middle of a text", "look: data:image/png;base64,AA !", True),
    ("a data URL with a quoted name", 'data:image/png;name="a b";base64,AA', True),
    ("a data URL over two lines", "data:image/png;\nname=x;base64,AA", True),
    ("a data URL as a key", {"data:image/png;base64,AA": 1}, True),
    ("a data URL, deep", {"a": [{"b": ["data:a/b;base64,"]}]}, True),
    ("a data URL that is not base64", "data:image/svg+xml;utf8,<svg/>", False),
    ("words about data URLs", "data: see https://example.com, or ;base64, for that", False),
    ("a key and its value", {"data:": ";base64,"}, False),
    ("two items of a list", ["data:image/png", ";base64,AA"], False),
    ("a token of 1,024 characters", token(1_024), False),
    ("a token of 1,025 characters", token(1_025), True),
    ("a token of 1,025 characters as a key", {token(1_025): None}, True),
    ("a token of 1,022 characters and padding", token(1_022) + "==", False),
    ("a token of 1,023 characters and padding", token(1_023) + "==", True),
    ("a token of 1,024 characters and three signs", token(1_022) + "===", False),
    ("tokens of 59 characters", " ".join([token(59)] * 500), False),
    ("tokens of 60 characters, 1,020 in all", " ".join([token(60)] * 17), False),
    ("tokens of 60 characters, 1,080 in all", " ".join([token(60)] * 18), True),
    ("tokens in many strings", [token(100)] * 10, False),
    ("one more token in many strings", [token(100)] * 11, True),
    ("tokens in keys and values", {token(513): token(512)}, True),
    ("short keys and values side by side", {token(59) + str(n): token(59) for n in range(9)}, False),
    ("lines of 76 characters", "\n".join([token(76)] * 20), True),
    ("lines of 59 characters", "\n".join([token(59)] * 100), False),
    ("the URL-safe alphabet", token(512) + "-_" + token(512), True),
    ("the standard alphabet", token(512) + "+/" + token(512), True),
    ("hexadecimal digits", "0123456789abcdef" * 65, True),
    ("a URL of 2,048 characters", url(2_048), False),
    ("a URL of 2,049 characters", url(2_049), True),
    ("many URLs", [url(2_000)] * 50, False),
    ("a URL in capitals", url(2_000).replace("https", "HTTPS"), False),
    ("a URL in a text", f"see {url(2_000)} and {url(2_000)}", False),
    ("a URL and a token behind it", f"{url(2_000)} {token(1_025)}", True),
    ("a URL in quotes", f'<a href="{url(2_000)}">{token(900)}</a>', False),
    ("no URL", "ftp://" + token(1_100), True),
    ("a scheme and nothing behind it", "https:// " + token(1_025), True),
    ("a prompt of 32,000 characters", "a red fox under a tall tree, " * 1_100, False),
    ("Chinese", "狐" * 32_000, False),
    ("text with escapes", 'a "red" fox\\under\ta\ntree ' * 1_000, False),
    ("backslashes in a token", "\\".join([token(59)] * 100), False),
    ("a very large number", int("7" * 1_025), True),
]


@pytest.mark.parametrize(("value", "refused"), [pytest.param(*case[1:], id=case[0]) for case in BOUNDARIES])
async def test_the_rule_at_its_boundaries(db: Db, value: Any, refused: bool) -> None:
    assert await db.fetchval("select image_jobs.has_base64($1)", value) is refused
    assert has_base64(value) is refused, "the oracle"


# Everything else

pieces = st.one_of(
    st.sampled_from(
        ["data:", "DATA:", ";base64,", ";Base64,", ",", '"', "\\", "\n", "\x01", "=", "==", "+", "-", "_", "/"]
    ),
    st.sampled_from(["http://", "https://", "HTTPS://", "https://a.io/", " ", "<", ">", ":", "ü", "狐", "image/png"]),
    st.sampled_from([30, 58, 59, 60, 61, 300, 1_023, 1_024, 1_025, 2_030, 2_048, 2_049]).map(token),
    st.text(max_size=5).filter(lambda text: "\x00" not in text and text.isprintable()),
)
strings = st.lists(pieces, max_size=8).map("".join)
values = st.recursive(
    strings | st.none() | st.booleans() | st.integers(0, 9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=5,
)


async def test_the_rule_agrees_with_the_oracle(postgres: Cluster) -> None:
    async with postgres.database() as dsn:
        connection = await connect(dsn)

        # Collected first: one example at a time would be a round trip each, in a loop that is not ours.
        found: list[Any] = []

        @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(values)
        @example([token(1_024), "https://" + token(2_041)])
        def collect(value: Any) -> None:
            found.append(value)

        collect()
        verdicts = await connection.fetchval(
            "select array_agg(image_jobs.has_base64(v.value) order by v.place) "
            "from jsonb_array_elements($1) with ordinality as v (value, place)",
            found,
        )
        await connection.close()
    wrong = [value for value, verdict in zip(found, verdicts, strict=True) if has_base64(value) is not verdict]
    assert not wrong, json.dumps(min(wrong, key=lambda value: len(json.dumps(value))))
    assert {True, False} == set(verdicts)


# The constraints

FILES: dict[str, Any] = {
    "a data URL": {"x": "data:image/png;base64,AA=="},
    "a bare file": {"x": PNG * 20},
    "a file as a key": {PNG * 20: "x"},
    "a file of more than a mebibyte": {"x": "data:image/png;base64," + PNG * 15_000},
}


@pytest.mark.parametrize("file", FILES)
async def test_metadata_is_refused_by_its_constraint(db: Db, file: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await insert_run(db, picture=FILES[file])
    assert refused.value.constraint_name == "runs_metadata_holds_no_base64"
    run = await insert_run(db)
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await db.execute("update runs set metadata = metadata || $2 where id = $1", run, FILES[file])
    assert refused.value.constraint_name == "runs_metadata_holds_no_base64"


async def test_a_previous_image_in_base64_is_refused_by_the_constraint(db: Db) -> None:
    with pytest.raises(asyncpg.CheckViolationError, match="runs_metadata_holds_no_base64"):
        await insert_run(db, prompt={"previousImage": "data:image/png;base64," + PNG})


@pytest.mark.parametrize("file", FILES)
async def test_a_payload_is_refused_by_its_constraint(db: Db, file: str) -> None:
    run = await insert_run(db)
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await db.execute("update runs set payload = $2 where id = $1", run, FILES[file])
    assert refused.value.constraint_name == "runs_payload_holds_no_base64"


async def test_a_settlement_with_a_file_is_refused(db: Db) -> None:
    await insert_run(db)
    daemon = await new_daemon(db)
    claimed = await daemon.claim_one()
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await daemon.complete(claimed, "data:image/png;base64,AA==")
    assert refused.value.constraint_name == "runs_payload_holds_no_base64"
    assert await daemon.complete(claimed) == "settled"


@pytest.mark.parametrize("file", FILES)
async def test_an_event_is_refused_by_its_constraint(db: Db, file: str) -> None:
    run = await insert_run(db)
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await db.execute("insert into run_events (run_id, kind, payload) values ($1, 'log', $2)", run, FILES[file])
    assert refused.value.constraint_name == "run_events_payload_holds_no_base64"
    with pytest.raises(asyncpg.CheckViolationError):
        await db.execute(
            "insert into run_events (run_id, kind, payload, run_kind) values ($1, 'log', $2, 'research')",
            run,
            FILES[file],
        )


@pytest.mark.parametrize("file", FILES)
async def test_a_node_is_refused_by_its_constraints(db: Db, file: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await insert_node(db, "n", WORKFLOW, **FILES[file])
    assert refused.value.constraint_name == "workflow_nodes_node_data_holds_no_base64"
    await insert_node(db, "n", WORKFLOW)
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await db.execute("update workflow_nodes set position = $1", FILES[file])
    assert refused.value.constraint_name == "workflow_nodes_position_holds_no_base64"


async def test_every_jsonb_column_of_ours_has_such_a_constraint(db: Db) -> None:
    rows = await db.fetch(
        """
        select c.table_schema || '.' || c.table_name as name, c.column_name, exists (
            select from pg_constraint k
            join pg_attribute a on a.attrelid = k.conrelid and a.attnum = any (k.conkey)
            where k.conrelid = format('%I.%I', c.table_schema, c.table_name)::regclass and k.contype = 'c'
              and k.conname like '%base64%' and a.attname = c.column_name
              and replace(pg_get_constraintdef(k.oid), '"', '') like '%has_base64(' || c.column_name || ')%') as guarded
        from information_schema.columns c
        join information_schema.tables t using (table_schema, table_name)
        where c.table_schema in ('public', 'private') and t.table_type = 'BASE TABLE' and c.data_type in ('json', 'jsonb')
        """
    )
    assert {(row["name"], row["column_name"]) for row in rows if not row["guarded"]} == set(WITHOUT)
    assert len(rows) >= 5


# Rows that are older than the rule


@pytest.fixture
async def older_file(db: Db) -> str:
    """Insert a completed run whose payload is a file, as if the rule had come later."""
    run = await insert_run(db)
    daemon = await new_daemon(db)
    await daemon.complete(await daemon.claim_one())
    await db.execute(
        "alter table runs drop constraint runs_payload_holds_no_base64; alter table runs disable trigger user"
    )
    file = {"imageUrl": "data:image/png;base64,AA=="}
    await db.execute("update runs set payload = $2, ticket = null where id = $1", run, file)
    await db.execute("alter table runs enable trigger user")
    await db.execute(
        "alter table runs add constraint runs_payload_holds_no_base64 "
        "check (kind is distinct from 'image_gen' or not image_jobs.has_base64(payload)) not valid"
    )
    return run


async def test_an_older_file_is_a_storage_violation(db: Db, older_file: str) -> None:
    (violation,) = await db.fetch("select * from image_jobs.storage_violations")
    assert tuple(violation) == ("runs", older_file, "payload")


async def test_requeueing_removes_an_older_file(db: Db, older_file: str) -> None:
    await db.execute("update runs set status = 'pending' where id = $1", older_file)
    assert await db.fetch("select * from image_jobs.storage_violations") == []
    assert "payload" not in (await events(db, older_file))[-1]["data"]
    daemon: Daemon = await new_daemon(db)
    assert await daemon.complete(await daemon.claim_one()) == "settled"
