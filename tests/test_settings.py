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


@pytest.mark.parametrize("value", ["0", "65536", "metrics"])
def test_a_port_that_cannot_be_is_refused(value):
    with pytest.raises(ValidationError, match="IMAGE_JOBS_METRICS_PORT"):
        settings(IMAGE_JOBS_METRICS_PORT=value)


def test_a_directory_that_is_not_there_is_refused_before_runs_fail_for_want_of_it(tmp_path):
    assert settings(IMAGE_JOBS_TMP_DIR=str(tmp_path)).tmp_dir == tmp_path
    with pytest.raises(ValidationError, match="IMAGE_JOBS_TMP_DIR"):
        settings(IMAGE_JOBS_TMP_DIR=str(tmp_path / "nowhere"))


def test_a_variable_without_a_value_is_one_that_is_not_set():
    blank = settings(IMAGE_JOBS_METRICS_PORT="", IMAGE_JOBS_TMP_DIR="", DATABASE_URL="")
    assert (blank.metrics_port, blank.tmp_dir, blank.database_url) == (None, None, None)


@pytest.mark.parametrize("value", ["", "too short", "long enough to be one,", "long enough to be one,short"])
def test_an_empty_or_short_webhook_secret_is_refused_since_forged_deliveries_would_verify(value):
    with pytest.raises(ValidationError, match=r"WEBHOOK_SECRET_OPENAI\n.*empty or shorter than 16 bytes"):
        settings(WEBHOOK_SECRET_OPENAI=value)


def test_one_webhook_secret_serves_all_that_have_none_of_their_own(monkeypatch):
    monkeypatch.setenv("WEBHOOK_SECRET", "the secret of everybody")
    monkeypatch.setenv("WEBHOOK_SECRET_OPENAI", "whsec_bmV3IHNlY3JldCBmb3IgaXQ=, whsec_b2xkIHNlY3JldCBmb3IgaXQ=")
    secrets = {
        name: [each.get_secret_value() for each in found]
        for name, found in Settings(_env_file=None).webhook_secrets.items()
    }
    assert secrets == {
        "openai": ["whsec_bmV3IHNlY3JldCBmb3IgaXQ=", "whsec_b2xkIHNlY3JldCBmb3IgaXQ="],
        "midjourney": ["the secret of everybody"],
        "hmac": ["the secret of everybody"],
    }


def test_without_a_webhook_secret_there_is_none_for_anybody():
    assert settings().webhook_secrets == {}
