"""The hint fits what becomes of the run: one while it is tried again, another once it is over, for every code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.errors import OutcomeUnknown, Retryable
from daemon.worker.outcomes import AGAIN, OVER, Failure, Retry
from tests.support.postgres import ROOT
from tests.support.protocol import Daemon, Db, new_daemon
from tests.support.runs import insert_run, run_row

BY_ITSELF = "by itself"
RAISED = {"Retryable", "OutcomeUnknown", "Refused", "Failure", "Undecodable"}


def hints(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each hint that a module gives an error of a run."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISED:
            for each in node.keywords:
                if each.arg == "hint":
                    yield each.value.lineno, words(each.value)
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "hint":
            yield node.lineno, words(node.value)


def words(value: ast.expr) -> str:
    return " ".join(str(part.value) for part in ast.walk(value) if isinstance(part, ast.Constant))


@pytest.mark.parametrize("room", ["errors.py", "providers", "worker", "storage", "fetch", "images"])
def test_no_hint_says_what_becomes_of_the_run(room: str) -> None:
    root = ROOT / "daemon" / room
    files = [root] if root.is_file() else sorted(root.rglob("*.py"))
    found = {f"{path.relative_to(ROOT)}:{line}": hint for path in files for line, hint in hints(path)}
    wrong = {place: hint for place, hint in found.items() if BY_ITSELF in hint or "restart" in hint}
    assert wrong == {}


CODES = [
    ("rate_limited", ""),
    ("provider_unavailable", ""),
    ("unreachable", "If it stays so, look at the network."),
    ("outcome_unknown", "It may have been paid for; another attempt makes a new one."),
    ("timeout", "If it stays so, choose a faster model."),
    ("empty_result", "If it stays so, rephrase the prompt."),
    ("billing", "Add credit."),
]


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    return await new_daemon(db)


def settlement(code: str, hint: str, *, refund: bool = False) -> dict[str, object]:
    """Return what the worker settles for an error that another attempt may mend."""
    kind = OutcomeUnknown if code in ("outcome_unknown", "timeout") else Retryable
    retry = Retry(Failure.of(kind("No.", code=code, hint=hint)), 0, "No. Trying again in 7 s.", refund)
    return {name: value for name, value in retry.to_json().items() if name != "outcome"}


@pytest.mark.one_postgres
@pytest.mark.parametrize(("code", "hint"), CODES)
async def test_the_hint_follows_the_fate_of_each_attempt(db: Db, daemon: Daemon, code: str, hint: str) -> None:
    run = await insert_run(db, nodeId="n")
    await db.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data) select 'n', subject_id, 'image', '{}' from runs"
    )
    for attempt in (1, 2, 3):
        await daemon.settle(await daemon.claim_one(), "retry", **settlement(code, hint))
        row = await run_row(db, run)
        node = await db.fetchval("select node_data from workflow_nodes")
        if attempt < 3:
            assert (row["status"], row["payload"]["hint"]) == ("pending", f"{hint} {AGAIN}".strip())
            assert node["message"] == row["message"] == "No. Trying again in 7 s."
            continue
        assert (row["status"], row["payload"]["hint"], row["message"]) == ("failed", f"{hint} {OVER}".strip(), None)
        assert node["message"] == row["payload"]["hint"]
        assert BY_ITSELF not in str(node)
        assert "Trying again" not in str(node)


@pytest.mark.one_postgres
async def test_a_refund_that_has_lapsed_is_over(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await db.execute("update runs set max_attempts = 1")
    await daemon.settle(await daemon.claim_one(), "retry", **settlement("rate_limited", "", refund=True))
    assert (await run_row(db, run))["payload"]["hint"] == AGAIN
    await daemon.settle(await daemon.claim_one(), "retry", **settlement("rate_limited", "", refund=False))
    assert (await run_row(db, run))["payload"]["hint"] == OVER
