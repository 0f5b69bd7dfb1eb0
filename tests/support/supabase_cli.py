"""The Supabase CLI, the real one from npm, in a project of its own. It needs no Docker for what is asked of it here."""

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path

from tests.support.postgres import ROOT

NODE_MODULES = ROOT / ".cache/supabase-cli/node_modules"

# A password, as it wants one; this server takes any.
USER, USER_WITH_PASSWORD = "//postgres@", "//postgres:any@"


class SupabaseCli:
    """Runs commands in a directory that has `supabase/migrations`, against one database."""

    def __init__(self, directory: Path, dsn: str) -> None:
        self.directory = directory
        self.migrations = directory / "supabase/migrations"
        self.migrations.mkdir(parents=True)
        (directory / "supabase/config.toml").write_text('project_id = "shop"\n')
        self._dsn = f"{dsn.replace(USER, USER_WITH_PASSWORD)}?sslmode=disable"

    async def __call__(self, *arguments: str) -> "Done":
        (program,) = NODE_MODULES.glob("@supabase/cli-*/bin/supabase")
        options = ("--db-url", self._dsn, "--workdir", str(self.directory), "--yes", "--agent", "no")
        process = await asyncio.create_subprocess_exec(
            program,
            *(*arguments, *options),
            # Neither the developer's settings nor anything outside of this machine.
            env={
                "HOME": str(self.directory),
                "PATH": os.environ["PATH"],
                "DO_NOT_TRACK": "1",
                "SUPABASE_TELEMETRY_DISABLED": "1",
                "HTTPS_PROXY": "http://127.0.0.1:9",
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())

    def write(self, name: str, sql: str) -> None:
        """Write a migration of the application."""
        (self.migrations / name).write_text(sql)

    async def push(self, *options: str) -> None:
        """Push what the database has not seen."""
        done = await self("db", "push", *options)
        assert done.code == 0, done

    async def versions(self) -> list[tuple[str, str]]:
        """List the versions of the migrations, here and there."""
        done = await self("migration", "list", "--output-format", "json")
        assert done.code == 0, done
        return [(row["local"], row["remote"]) for row in json.loads(done.out)["migrations"]]

    async def advisors(self) -> set[tuple[str, str]]:
        """Return what the advisors warn about: name of the lint, and of the object it is about."""
        done = await self("db", "advisors", "--level", "warn", "--output-format", "json")
        assert done.code == 0, done
        return {(lint["name"], lint["detail"]) for lint in json.loads(done.out)["results"]}


@dataclass(frozen=True, slots=True)
class Done:
    """One command that has ended."""

    code: int
    out: str
    err: str
