"""The keys of the stand-in."""

import asyncio
from pathlib import Path

from daemon.dev.supabase.keys import Keys


async def test_keys_of_a_directory_stay_the_same(tmp_path: Path) -> None:
    first, second = await asyncio.to_thread(_load_twice, tmp_path)
    assert first == second
    assert first.claims(first.service_role_key)["role"] == "service_role"


def _load_twice(directory: Path) -> tuple[Keys, Keys]:
    from daemon.dev.supabase.keys import load_keys

    pair = load_keys(directory / "data"), load_keys(directory / "data")
    assert (directory / "data/jwt-secret").stat().st_mode & 0o077 == 0
    return pair
