"""Values that the environment may have, and what becomes of the others."""

from datetime import timedelta

import pytest
from pydantic import ValidationError

from daemon.settings import Settings


def settings(**environment: str) -> Settings:
    return Settings.model_validate(environment)


def test_a_duration_is_a_number_of_seconds():
    assert settings(IMAGE_JOBS_POLL_INTERVAL="2.5").poll_interval == timedelta(seconds=2.5)


@pytest.mark.parametrize("value", ["-1", "inf", "nan", "1e300", "soon"])
def test_a_duration_that_cannot_be_is_refused(value):
    with pytest.raises(ValidationError, match="IMAGE_JOBS_POLL_INTERVAL"):
        settings(IMAGE_JOBS_POLL_INTERVAL=value)


@pytest.mark.parametrize("value", ["0", "0.9"])
def test_a_lease_too_short_to_be_kept_is_refused(value):
    with pytest.raises(ValidationError, match="IMAGE_JOBS_LEASE"):
        settings(IMAGE_JOBS_LEASE=value)
