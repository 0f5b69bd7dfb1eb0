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


def release(directory: Path, second: str) -> Path:
    """Make a directory like `sql` that has ours and a second file. Returns it; does nothing if it is there."""
    if not (directory / "migrations").exists():
        shutil.copytree(MIGRATIONS, directory / "migrations")
        (directory / "migrations/0002_second.sql").write_text(second)
    return directory
