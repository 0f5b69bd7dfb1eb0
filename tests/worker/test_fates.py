"""The hint fits what becomes of the run: one while it is tried again, another once it is over, for every code."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from daemon.errors import OutcomeUnknown, Retryable
from daemon.worker.outcomes import AGAIN, OVER, Failure, Retry
from tests.support.postgres import ROOT
from tests.support.protocol import Daemon, Db, new_daemon
from tests.support.runs import insert_run, run_row

BY_ITSELF = "by itself"
AGAIN_OR_OVER = {"Retryable", "OutcomeUnknown"}
"""Errors whose runs are tried again, until there are no attempts left; all others are over at once."""
RAISED = AGAIN_OR_OVER | {"Refused", "Failure", "Undecodable"}


class Hint(NamedTuple):
    """The code and the hint that a module gives an error of a run, as far as they are written there."""

    place: str
    error: str
    code: str
    text: str


def hints(path: Path) -> Iterator[Hint]:
    """Yield the hints of a module: of errors, and those that a variable of this name gets."""
    for node in ast.walk(ast.parse(path.read_text())):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISED:
            given = {each.arg: each.value for each in node.keywords}
            if "hint" in given:
                yield Hint(place, node.func.id, words(given["code"]), words(given["hint"]))
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "hint":
            yield Hint(place, "", "", words(node.value))


def words(value: ast.expr) -> str:
    return " ".join(str(part.value) for part in ast.walk(value) if isinstance(part, ast.Constant))


FOUND = [hint for path in sorted((ROOT / "daemon").rglob("*.py")) for hint in hints(path)]


def test_no_hint_says_what_becomes_of_the_run() -> None:
    wrong = [it for it in FOUND if BY_ITSELF in it.text or "restart" in it.text]
    # One and the same hint for "again" and for "over": a run that is tried again needs no requeue.
    wrong += [it for it in FOUND if it.error in AGAIN_OR_OVER and "equeue" in it.text]
    assert wrong == []


def codes() -> list[tuple[str, str]]:
    """Return every code of an error that another attempt may mend, with each of its hints."""
    found = {(it.code or "storage_disk", it.text) for it in FOUND if it.error in AGAIN_OR_OVER}
    return sorted(found | {("input_image", "Check the address.")})


def test_the_table_of_codes_is_whole() -> None:
    assert {code for code, _ in codes()} >= {
        *("billing", "decoder_killed", "empty_result", "input_image", "internal", "lease_lapsed", "outcome_unknown"),
        *("provider_unavailable", "quota_daily", "rate_limited", "storage_timeout", "timeout", "unreachable"),
    }


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    return await new_daemon(db)


def settlement(code: str, hint: str, *, refund: bool = False) -> dict[str, object]:
    """Return what the worker settles for an error that another attempt may mend."""
    kind = OutcomeUnknown if code in ("outcome_unknown", "timeout") else Retryable
    retry = Retry(Failure.of(kind("No.", code=code, hint=hint)), 0, "No. Trying again in 7 s.", refund)
    return {name: value for name, value in retry.to_json().items() if name != "outcome"}


@pytest.mark.one_postgres
async def test_the_hint_follows_the_fate_of_each_attempt(db: Db, daemon: Daemon) -> None:
    for node, (code, hint) in enumerate(codes()):
        run = await insert_run(db, nodeId=str(node))
        await db.execute(
            """insert into workflow_nodes (id, workflow_id, node_type, node_data)
            select metadata ->> 'nodeId', subject_id, 'image', '{}' from runs where id = $1""",
            run,
        )
        for attempt in (1, 2, 3):
            await daemon.settle(await daemon.claim_one(), "retry", **settlement(code, hint))
            row = await run_row(db, run)
            shown = await db.fetchval("select node_data from workflow_nodes where id = $1", str(node))
            if attempt < 3:
                assert (row["status"], row["payload"]["hint"]) == ("pending", f"{hint} {AGAIN}".strip())
                assert shown["message"] == row["message"] == "No. Trying again in 7 s."
                continue
            assert (row["status"], row["message"]) == ("failed", None)
            assert shown["message"] == row["payload"]["hint"] == f"{hint} {OVER}".strip()
            assert BY_ITSELF not in str(shown)
            assert "Trying again" not in str(shown)


@pytest.mark.one_postgres
async def test_a_refund_that_has_lapsed_is_over(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await db.execute("update runs set max_attempts = 1")
    await daemon.settle(await daemon.claim_one(), "retry", **settlement("rate_limited", "", refund=True))
    assert (await run_row(db, run))["payload"]["hint"] == AGAIN
    await daemon.settle(await daemon.claim_one(), "retry", **settlement("rate_limited", "", refund=False))
    assert (await run_row(db, run))["payload"]["hint"] == OVER
