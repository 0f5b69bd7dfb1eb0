"""Fixtures: where a download goes, and an authority that a fetch trusts."""

import ssl
from pathlib import Path

import pytest
import trustme


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "download"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    tls = ssl.create_default_context()
    authority.configure_trust(tls)
    return tls
