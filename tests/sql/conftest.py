"""Who takes part: a daemon, a member of the workflow, a node."""

from uuid import UUID

import pytest

from tests.runs import WORKFLOW
from tests.sql.protocol import Daemon, Db, insert_node, new_daemon


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    """A daemon that serves demo."""
    return await new_daemon(db)


@pytest.fixture
async def member(db: Db) -> UUID:
    """A member of the workflow that the tests' runs are in."""
    user = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", WORKFLOW, user)
    return user


@pytest.fixture
async def node(db: Db) -> str:
    """A node of that workflow."""
    await insert_node(db, "n", WORKFLOW, label="mine")
    return "n"
