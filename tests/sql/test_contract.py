"""The daemon's JSON: the tables of sql/README.md, the keys that the SQL reads and returns, and those of our daemon."""

import re

import pytest

from daemon.calls import Call
from daemon.queue.outbox import Progress
from daemon.worker.outcomes import Outcome
from tests.support.postgres import ROOT
from tests.support.protocol import Daemon, Db, run_in
from tests.worker.test_outcomes import EVENT, FULL
from tests.worker.test_retries import claimed

pytestmark = pytest.mark.every_postgres

README = (ROOT / "sql/README.md").read_text()
SCHEMA = ROOT / "sql/schema"


def section(title: str) -> str:
    """Read one section of "The daemon's JSON"."""
    (found,) = re.findall(rf"^### {title}\n(.*?)(?=^##)", README, re.MULTILINE | re.DOTALL)
    return found


def documented(title: str) -> dict[str, str]:
    """Read the table of a section: {key: type}."""
    return dict(re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", section(title), re.MULTILINE))


def body(file: str, function: str) -> str:
    """Read the body of a function."""
    text = (SCHEMA / file).read_text()
    (found,) = re.findall(
        rf"^create or replace function image_jobs\.{function}\(.*?^\$\$;", text, re.MULTILINE | re.DOTALL
    )
    return found


def columns(sql: str) -> dict[str, str]:
    """Read the columns of all jsonb_to_recordset calls: {key: type}. One key has one type."""
    pairs = {
        tuple(column.split(None, 1))
        for columns in re.findall(r"jsonb_to_recordset\(p_\w+\) as \w+ \((.*?)\)", sql, re.DOTALL)
        for column in re.split(r",\s*", columns.strip())
    }
    found = dict(pairs)
    assert len(found) == len(pairs), pairs
    return found


def keys(sql: str, value: str) -> set[str]:
    """Find the keys that are read from a jsonb value."""
    return set(re.findall(rf"\b{re.escape(value)} ->>? '(\w+)'", sql))


def test_settle_runs_reads_the_documented_keys() -> None:
    sql = body("41_settle_runs.sql", "settle_runs") + body("29_provider_streaks.sql", "note_responses")
    sql += body("29_calls.sql", "makers_of_jobs")
    wanted = documented("A settlement")
    read = columns(sql)
    assert {key: wanted[key] for key in read} == read
    default = keys(body("29_calls.sql", "calls_of"), "p_settlement")
    assert read.keys() | keys(sql, "s.value") | default == wanted.keys()


def test_record_progress_reads_the_documented_keys() -> None:
    sql, wanted = body("42_record_progress.sql", "record_progress"), documented("A progress entry")
    read = columns(sql)
    assert {key: wanted[key] for key in read} == read
    assert read.keys() | keys(sql, "e.value") == wanted.keys()


def test_close_calls_reads_the_documented_keys() -> None:
    assert columns(body("29_calls.sql", "close_calls")) == documented("A call")
    assert (
        Call(id=1, state="open", cost=0, estimate=0, model="", provider_job_id="", sent_at=0, image=True, image_at=0)
        .to_json()
        .keys()
        == documented("A call").keys()
    )


def test_events_have_the_documented_keys() -> None:
    wanted = documented("An event").keys()
    assert keys(body("41_settle_runs.sql", "add_events"), "e.value") - {"run_id"} == wanted
    assert keys(body("41_settle_runs.sql", "settle_runs"), "s.if_lost") <= wanted


async def test_a_claimed_run_has_the_documented_keys(db: Db, daemon: Daemon) -> None:
    await run_in(db, daemon, "pending")
    claimed = await daemon.claim_one()
    assert claimed.keys() - {"part"} == documented("A claimed run").keys()


async def test_a_result_has_the_documented_keys(db: Db, daemon: Daemon) -> None:
    await run_in(db, daemon, "pending")
    claimed = await daemon.claim_one()
    entry = {"id": claimed["id"], "claim": claimed["claim"]}
    wanted = documented("A result").keys()
    (recorded,) = await daemon.sync(progress=[{**entry, "progress": 1}])
    (settled,) = await daemon.sync(settlements=[{**entry, "outcome": "released"}])
    assert recorded.keys() - {"part"} == wanted - {"fate"}
    assert settled.keys() - {"part"} == wanted


def test_our_daemon_reads_the_documented_keys() -> None:
    source = (ROOT / "daemon/run.py").read_text()
    (read,) = re.findall(r"def read\(cls, daemon.*?\n        \)", source, re.DOTALL)
    assert set(re.findall(r'run\["(\w+)"\]', read)) == documented("A claimed run").keys()


@pytest.mark.parametrize("outcome", [outcome for outcome, _ in FULL], ids=lambda it: it.name)
def test_our_outcomes_write_keys_documented_for_them(outcome: Outcome) -> None:
    rows = re.findall(r"^\| `(\w+)` \| [a-z ]+ \| ([a-z, ]+) \|", section("A settlement"), re.MULTILINE)
    assert {key for key, _ in rows} == documented("A settlement").keys()
    allowed = {key for key, outcomes in rows if outcomes == "all" or outcome.name in outcomes.split(", ")}
    assert outcome.to_json().keys() <= allowed


def test_our_daemon_writes_the_documented_keys() -> None:
    written = {key for outcome, _ in FULL for key in outcome.to_json()} | {"id", "claim"}
    assert written == documented("A settlement").keys()
    assert Progress(claimed()).to_json().keys() == documented("A progress entry").keys()
    assert EVENT.to_json().keys() == documented("An event").keys()
