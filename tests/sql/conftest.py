"""Fixtures: a daemon, a member of the workflow, a node."""

from uuid import UUID

import pytest

from tests.support.protocol import Daemon, Db, insert_node, new_daemon
from tests.support.runs import WORKFLOW


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    """Register a daemon that serves demo."""
    return await new_daemon(db)


@pytest.fixture
async def member(db: Db) -> UUID:
    """Add a member to the workflow of the tests' runs."""
    user = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", WORKFLOW, user)
    return user


@pytest.fixture
async def node(db: Db) -> str:
    """Insert a node of that workflow."""
    await insert_node(db, "n", WORKFLOW, label="mine")
    return "n"
