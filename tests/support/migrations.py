"""Migrations that are none of ours yet: a later file in the frame that `sql/README.md` has, a database from before."""

import re
import shutil
from pathlib import Path

from tests.support.postgres import MIGRATIONS, ROOT

BEFORE_THE_LEDGER = "drop table image_jobs.migrations"
"""Makes of a migrated database one that was made before there was a ledger."""


def later_file(body: str) -> str:
    """Return `0002_second.sql`, which does `body`, in the frame of `sql/README.md`."""
    (frame,) = re.findall(r"```plpgsql\n(do \$migration_0002\$.*?)```", (ROOT / "sql/README.md").read_text(), re.DOTALL)
    return frame.replace("  …\n", f"  {body};\n")


def without_comments(directory: Path) -> None:
    """Take comments and indentation out of a release's first file: the Supabase CLI takes the square of its length."""
    path = directory / "migrations/0001_initial.sql"
    lines = (line.strip() for line in path.read_text().splitlines())
    path.write_text("\n".join(line for line in lines if line and not line.startswith("--")) + "\n")


def release(directory: Path, second: str) -> Path:
    """Make a directory like `sql` that has ours and a second file. Returns it; does nothing if it is there."""
    if not (directory / "migrations").exists():
        shutil.copytree(MIGRATIONS, directory / "migrations")
        (directory / "migrations/0002_second.sql").write_text(second)
    return directory
