"""Fixtures of the commands."""

import pytest

from tests.support.commands import ImageJobs


@pytest.fixture
def image_jobs(tmp_path) -> ImageJobs:
    return ImageJobs(tmp_path)
