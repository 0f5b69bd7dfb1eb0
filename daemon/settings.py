"""What the environment may say. Read once, in `cli.py`; everything else gets plain values."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated

from pydantic import BeforeValidator, DirectoryPath, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _seconds(value: object) -> object:
    """A bare number in the environment is a number of seconds."""
    if isinstance(value, str):
        try:
            return timedelta(seconds=float(value))
        except (ValueError, OverflowError):
            return value
    return value


def _webhook_secrets(value: object) -> object:
    """Several secrets are separated by commas. With an empty one, forged deliveries would verify."""
    if not isinstance(value, str):
        return value
    secrets = [secret.strip() for secret in value.split(",")]
    if any(len(secret.encode()) < SHORTEST_WEBHOOK_SECRET for secret in secrets):
        raise ValueError(
            f"a secret is empty or shorter than {SHORTEST_WEBHOOK_SECRET} bytes; remove the variable to accept no webhooks"
        )
    return tuple(SecretStr(secret) for secret in secrets)


def _blank(value: object) -> object:
    """`NAME=` means that it is not set."""
    return None if value == "" else value


SHORTEST_WEBHOOK_SECRET = 16
"""Bytes. `private.set_webhook_secrets` holds to the same."""

Seconds = Annotated[timedelta, Field(ge=timedelta(0)), BeforeValidator(_seconds)]
Lease = Annotated[timedelta, Field(ge=timedelta(seconds=1)), BeforeValidator(_seconds)]  # six beats have to fit in
Secret = Annotated[SecretStr | None, BeforeValidator(_blank)]
WebhookSecrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_webhook_secrets)]
Text = Annotated[str | None, BeforeValidator(_blank)]
Port = Annotated[Annotated[int, Field(ge=1, le=65535)] | None, BeforeValidator(_blank)]
Directory = Annotated[DirectoryPath | None, BeforeValidator(_blank)]


class Settings(BaseSettings):
    """Every variable the daemon reads, with its meaning."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True, populate_by_name=True)

    database_url: Secret = Field(None, alias="DATABASE_URL", description="Postgres, direct or session pooler (5432)")
    supabase_url: Text = Field(None, alias="SUPABASE_URL", description="the project's address")
    service_role_key: Secret = Field(
        None, alias="SUPABASE_SERVICE_ROLE_KEY", description="service role or secret key: uploads to Storage"
    )
    anon_key: Secret = Field(
        None, alias="SUPABASE_ANON_KEY", description="anon or publishable key: what a frontend uses"
    )
    app_url: Text = Field(
        None,
        alias="APP_URL",
        description="the frontend's address; what is logged of a failed run links to its workflow, `APP_URL#<id>`",
    )

    openai_api_key: Secret = Field(None, alias="OPENAI_API_KEY", description="turns `openai:…` on")
    openai_base_url: Text = Field(None, alias="OPENAI_BASE_URL", description="an OpenAI-compatible server instead")

    google_api_key: Secret = Field(None, alias="GOOGLE_API_KEY", description="turns `google:…` on")
    gemini_api_key: Secret = Field(None, alias="GEMINI_API_KEY", description="the same, by its other name")
    google_base_url: Text = Field(None, alias="GOOGLE_BASE_URL", description="another server with the Gemini API")
    stability_api_key: Secret = Field(None, alias="STABILITY_API_KEY", description="turns `stability:…` on")
    stability_base_url: Text = Field(
        None, alias="STABILITY_BASE_URL", description="another server with Stability's API"
    )
    midjourney_api_url: Text = Field(
        None, alias="MIDJOURNEY_API_URL", description="a midjourney-proxy: turns `midjourney:…` on"
    )
    midjourney_api_key: Secret = Field(
        None, alias="MIDJOURNEY_API_KEY", description="its `mj-api-secret`, if it has one"
    )

    webhook_secret: WebhookSecrets = Field(
        (),
        alias="WEBHOOK_SECRET",
        description="verifies webhooks of all providers; several, separated by commas, while one is replaced",
    )
    webhook_secret_openai: WebhookSecrets = Field(
        (), alias="WEBHOOK_SECRET_OPENAI", description="verifies `webhook_openai` instead"
    )
    webhook_secret_midjourney: WebhookSecrets = Field(
        (), alias="WEBHOOK_SECRET_MIDJOURNEY", description="verifies `webhook_midjourney` instead"
    )
    webhook_secret_hmac: WebhookSecrets = Field(
        (), alias="WEBHOOK_SECRET_HMAC", description="verifies `webhook_hmac` instead"
    )

    demo: bool = Field(False, alias="IMAGE_JOBS_DEMO", description="offer `demo:painter`, which needs no key")
    concurrency: int = Field(16, alias="IMAGE_JOBS_CONCURRENCY", ge=1, le=1000, description="runs at once, per daemon")
    lease: Lease = Field(
        timedelta(seconds=30), alias="IMAGE_JOBS_LEASE", description="seconds of silence until others take over"
    )
    drain_timeout: Seconds = Field(
        timedelta(seconds=240), alias="IMAGE_JOBS_DRAIN_TIMEOUT", description="seconds to finish runs after SIGTERM"
    )
    run_timeout: Seconds = Field(
        timedelta(minutes=10), alias="IMAGE_JOBS_RUN_TIMEOUT", description="seconds one call to a provider may take"
    )
    poll_interval: Seconds = Field(
        timedelta(seconds=5), alias="IMAGE_JOBS_POLL_INTERVAL", description="seconds between two checks of a parked run"
    )
    poll_timeout: Seconds = Field(
        timedelta(minutes=5), alias="IMAGE_JOBS_POLL_TIMEOUT", description="seconds until a parked run is given up"
    )
    webhook_wait: Seconds = Field(
        timedelta(seconds=60),
        alias="IMAGE_JOBS_WEBHOOK_WAIT",
        description="seconds to wait for a webhook before polling",
    )
    strict_models: bool = Field(
        False,
        alias="IMAGE_JOBS_STRICT_MODELS",
        description="fail runs of retired models instead of using the successor",
    )
    bucket: str = Field(
        "images", alias="IMAGE_JOBS_BUCKET", description="the Storage bucket; beside it, `…-context` is private"
    )
    max_image_bytes: int = Field(
        50_000_000, alias="IMAGE_JOBS_MAX_IMAGE_BYTES", ge=1, description="larger images are refused"
    )
    max_image_pixels: int = Field(
        100_000_000, alias="IMAGE_JOBS_MAX_IMAGE_PIXELS", ge=1, description="larger images are refused"
    )
    log_format: Annotated[str | None, BeforeValidator(_blank)] = Field(
        None,
        alias="IMAGE_JOBS_LOG_FORMAT",
        pattern="^(json|pretty)$",
        description="json or pretty; pretty on a terminal",
    )
    metrics_port: Port = Field(
        None, alias="IMAGE_JOBS_METRICS_PORT", description="serve Prometheus metrics there (extra `metrics`)"
    )
    tmp_dir: Directory = Field(None, alias="IMAGE_JOBS_TMP_DIR", description="where images lie until they are stored")

    @property
    def context_bucket(self) -> str:
        """What providers said beside the images lies here; `private.make_bucket` names it like this."""
        return f"{self.bucket}-context"

    @property
    def webhook_secrets(self) -> Mapping[str, tuple[SecretStr, ...]]:
        """For each `webhook_<name>` of the database the secrets that verify it, the one to sign with first; only those
        that have any."""
        own = {
            "openai": self.webhook_secret_openai,
            "midjourney": self.webhook_secret_midjourney,
            "hmac": self.webhook_secret_hmac,
        }
        return {name: found for name, secrets in own.items() if (found := secrets or self.webhook_secret)}
