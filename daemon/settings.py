"""Reads the environment, once, for the commands in `cli/`; everything else gets plain values."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from daemon import environment
from daemon.variables import (
    AlertUrl,
    BaseUrl,
    Bucket,
    DatabaseUrl,
    Days,
    Directory,
    Dollars,
    Flag,
    Lasting,
    Lease,
    LogFormat,
    Port,
    Seconds,
    Secret,
    ShownBaseUrl,
    ShownUrl,
    WebhookSecrets,
    Whole,
    stripped,
    tidied,
)


class Settings(BaseSettings):
    """Every variable the daemon reads, with its meaning."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, populate_by_name=True, hide_input_in_errors=True)

    database_url: DatabaseUrl = Field(
        None, alias="DATABASE_URL", description="Postgres, direct or session pooler (5432)"
    )
    supabase_url: ShownBaseUrl = Field(None, alias="SUPABASE_URL", description="the project's address")
    service_role_key: Secret = Field(
        None, alias="SUPABASE_SERVICE_ROLE_KEY", description="service role or secret key: uploads to Storage"
    )
    anon_key: Secret = Field(
        None, alias="SUPABASE_ANON_KEY", description="anon or publishable key: what a frontend uses"
    )
    app_url: ShownUrl = Field(
        None,
        alias="APP_URL",
        description="the frontend's address; what is logged of a failed run links to its workflow, `APP_URL#<id>`",
    )

    openai_api_key: Secret = Field(None, alias="OPENAI_API_KEY", description="turns `openai:…` on")
    openai_organization: Secret = Field(
        None, alias="OPENAI_ORG_ID", description="which of the key's organizations pays, if it has several"
    )
    openai_project: Secret = Field(
        None, alias="OPENAI_PROJECT_ID", description="which of the organization's projects pays, if the key has several"
    )
    openai_base_url: BaseUrl = Field(None, alias="OPENAI_BASE_URL", description="an OpenAI-compatible server instead")

    google_api_key: Secret = Field(None, alias="GOOGLE_API_KEY", description="turns `google:…` on")
    gemini_api_key: Secret = Field(None, alias="GEMINI_API_KEY", description="the same, by its other name")
    google_base_url: BaseUrl = Field(None, alias="GOOGLE_BASE_URL", description="another server with the Gemini API")
    stability_api_key: Secret = Field(None, alias="STABILITY_API_KEY", description="turns `stability:…` on")
    stability_base_url: BaseUrl = Field(
        None, alias="STABILITY_BASE_URL", description="another server with Stability's API"
    )
    midjourney_api_url: BaseUrl = Field(
        None, alias="MIDJOURNEY_API_URL", description="a midjourney-proxy: turns `midjourney:…` on"
    )
    midjourney_api_key: Secret = Field(
        None, alias="MIDJOURNEY_API_KEY", description="its `mj-api-secret`, if it has one"
    )

    midjourney_price: Dollars = Field(
        None,
        alias="IMAGE_JOBS_MIDJOURNEY_PRICE",
        description="USD that one Midjourney image costs you; unset: costs are not known",
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

    demo: Flag = Field(False, alias="IMAGE_JOBS_DEMO", description="offer `demo:painter`, which needs no key")
    concurrency: Whole = Field(
        16, alias="IMAGE_JOBS_CONCURRENCY", ge=1, le=1000, description="runs at once, per daemon"
    )
    lease: Lease = Field(
        timedelta(seconds=30), alias="IMAGE_JOBS_LEASE", description="seconds of silence until others take over"
    )
    drain_timeout: Seconds = Field(
        timedelta(seconds=240), alias="IMAGE_JOBS_DRAIN_TIMEOUT", description="seconds to finish runs after SIGTERM"
    )
    unserved_grace: Seconds = Field(
        timedelta(minutes=2),
        alias="IMAGE_JOBS_UNSERVED_GRACE",
        description="seconds that runs wait for a provider which the last daemon has left, before this one fails them",
    )
    run_timeout: Lasting = Field(
        timedelta(minutes=10), alias="IMAGE_JOBS_RUN_TIMEOUT", description="seconds one call to a provider may take"
    )
    poll_interval: Lasting = Field(
        timedelta(seconds=5), alias="IMAGE_JOBS_POLL_INTERVAL", description="seconds between two checks of a parked run"
    )
    poll_timeout: Lasting = Field(
        timedelta(minutes=5), alias="IMAGE_JOBS_POLL_TIMEOUT", description="seconds until a parked run is given up"
    )
    webhook_wait: Seconds = Field(
        timedelta(seconds=60),
        alias="IMAGE_JOBS_WEBHOOK_WAIT",
        description="seconds to wait for a webhook before polling",
    )
    strict_models: Flag = Field(
        False,
        alias="IMAGE_JOBS_STRICT_MODELS",
        description="fail runs of retired models instead of using the successor",
    )
    bucket: Bucket = Field(
        "images",
        alias="IMAGE_JOBS_BUCKET",
        description="the Storage bucket; beside it, `…-context`, `…-kept` and `image-sources` are private",
    )
    private: Flag = Field(
        False,
        alias="IMAGE_JOBS_PRIVATE",
        description="images open to members of their workflow alone: `migrate` makes the bucket private",
    )
    retention: Days = Field(
        None,
        alias="IMAGE_JOBS_RETENTION",
        description="days that a run is kept after its end, with its events and files; unset: for ever",
    )
    max_image_bytes: Whole = Field(
        50_000_000, alias="IMAGE_JOBS_MAX_IMAGE_BYTES", ge=10_000, description="larger images are refused"
    )
    max_image_pixels: Whole = Field(
        100_000_000, alias="IMAGE_JOBS_MAX_IMAGE_PIXELS", ge=10_000, description="larger images are refused"
    )
    log_format: LogFormat = Field(
        None, alias="IMAGE_JOBS_LOG_FORMAT", description="json or pretty; pretty on a terminal"
    )
    metrics_port: Port = Field(
        None, alias="IMAGE_JOBS_METRICS_PORT", description="serve Prometheus metrics there (extra `metrics`)"
    )
    alert_url: AlertUrl = Field(
        None,
        alias="IMAGE_JOBS_ALERT_URL",
        description="where alerts are posted, as Slack and its kin take them; a secret",
    )
    tmp_dir: Directory = Field(None, alias="IMAGE_JOBS_TMP_DIR", description="where images lie until they are stored")

    @field_validator("*", mode="before")
    @classmethod
    def _tidy(cls, value: object) -> object:
        return tidied(value)

    @model_validator(mode="before")
    @classmethod
    def _unset(cls, data: Any) -> Any:
        """Take `NAME=` as not set, whatever the variable."""
        if not isinstance(data, dict):
            return data
        values = cast("dict[str, object]", data)
        return {name: value for name, value in values.items() if not (isinstance(value, str) and not stripped(value))}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - `_Environment` does it
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - and this
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls)

    @property
    def conversation_bucket(self) -> str:
        """The bucket of conversations; `image_jobs.storage_steps` names it like this."""
        return f"{self.bucket}-context"

    @property
    def kept_bucket(self) -> str:
        """The bucket of what cannot be decoded; `image_jobs.storage_steps` names it like this."""
        return f"{self.bucket}-kept"

    @property
    def webhook_secrets(self) -> Mapping[str, tuple[SecretStr, ...]]:
        """The secrets that verify each `webhook_<name>` of the database, the one to sign with first; only those that have
        any."""
        own = {
            "openai": self.webhook_secret_openai,
            "midjourney": self.webhook_secret_midjourney,
            "hmac": self.webhook_secret_hmac,
        }
        return {name: found for name, secrets in own.items() if (found := secrets or self.webhook_secret)}


class _Environment(PydanticBaseSettingsSource):
    """The process's variables and those of `.env`."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # only `__call__` is used

    def __call__(self) -> dict[str, Any]:
        found = environment.variables()
        names = [str(field.alias) for field in self.settings_cls.model_fields.values()]
        return {name: found[name] for name in names if name in found}
