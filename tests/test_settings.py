"""Values that the environment may have, and what becomes of the others."""

from datetime import timedelta

import httpx
import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from daemon.settings import Settings

NAMES = [str(field.alias) for field in Settings.model_fields.values()]
KEYS = [str(field.alias) for field in Settings.model_fields.values() if field.alias and field.alias.endswith("_KEY")]
ADDRESSES = [
    "SUPABASE_URL",
    "APP_URL",
    "OPENAI_BASE_URL",
    "GOOGLE_BASE_URL",
    "STABILITY_BASE_URL",
    "MIDJOURNEY_API_URL",
]


def settings(**environment: str) -> Settings:
    return Settings.model_validate(environment)


def refused(name: str, value: str) -> str:
    """Return why a value is refused, and make sure that only this variable is spoken of, in one line without the value."""
    with pytest.raises(ValidationError) as raised:
        settings(**{name: value})
    (wrong,) = raised.value.errors(include_url=False, include_input=False, include_context=False)
    assert wrong["loc"][0] == name
    assert "\n" not in wrong["msg"]
    assert len(value) < 9 or value not in str(raised.value)
    return wrong["msg"].removeprefix("Value error, ")


def plain(made: Settings, name: str) -> object:
    (field,) = [field for field, about in Settings.model_fields.items() if about.alias == name]
    value = getattr(made, field)
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def test_a_duration_is_a_number_of_seconds():
    assert settings(IMAGE_JOBS_POLL_INTERVAL="2.5").poll_interval == timedelta(seconds=2.5)


@pytest.mark.parametrize("value", ["-1", "inf", "nan", "1e300", "soon"])
def test_a_duration_that_cannot_be_is_refused(value):
    with pytest.raises(ValidationError, match="IMAGE_JOBS_POLL_INTERVAL"):
        settings(IMAGE_JOBS_POLL_INTERVAL=value)


@pytest.mark.parametrize("name", ["RUN_TIMEOUT", "POLL_TIMEOUT", "POLL_INTERVAL"])
@pytest.mark.parametrize("value", ["0", "0.05", "-0"])
def test_a_time_too_short_for_anything_is_refused(name, value):
    assert refused(f"IMAGE_JOBS_{name}", value) == "it should be at least 0.1 seconds"


@pytest.mark.parametrize("name", ["IMAGE_JOBS_MAX_IMAGE_BYTES", "IMAGE_JOBS_MAX_IMAGE_PIXELS"])
def test_a_limit_that_no_image_passes_is_refused(name):
    with pytest.raises(ValidationError, match=name):
        settings(**{name: "1"})


@pytest.mark.parametrize("value", ["0", "0.9"])
def test_a_lease_too_short_to_be_kept_is_refused(value):
    with pytest.raises(ValidationError, match="IMAGE_JOBS_LEASE"):
        settings(IMAGE_JOBS_LEASE=value)


@pytest.mark.parametrize("value", ["0", "65536", "metrics"])
def test_a_port_that_cannot_be_is_refused(value):
    with pytest.raises(ValidationError, match="IMAGE_JOBS_METRICS_PORT"):
        settings(IMAGE_JOBS_METRICS_PORT=value)


def test_missing_directory_is_refused_at_the_start(tmp_path):
    assert settings(IMAGE_JOBS_TMP_DIR=str(tmp_path)).tmp_dir == tmp_path
    with pytest.raises(ValidationError, match="IMAGE_JOBS_TMP_DIR"):
        settings(IMAGE_JOBS_TMP_DIR=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("blank", ["", "  ", '""', "\n"])
def test_empty_variable_is_not_set_whatever_it_is(blank):
    assert settings(**dict.fromkeys(NAMES, blank)) == settings()


@pytest.mark.parametrize("value", ["too short", "long enough to be one,", "long enough to be one,short"])
def test_short_webhook_secret_is_refused(value):
    with pytest.raises(ValidationError, match=r"WEBHOOK_SECRET_OPENAI\n.*empty or shorter than 16 bytes"):
        settings(WEBHOOK_SECRET_OPENAI=value)


def test_shared_webhook_secret_serves_providers_without_one(monkeypatch):
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


def test_without_webhook_secrets_there_are_none():
    assert settings().webhook_secrets == {}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("around", ["{}\n", " {}\r\n", '"{}"', "'{} '\n", "\ufeff{}\u200b", "“{}”"])
def test_keys_lose_what_surrounds_them(name, around):
    assert plain(settings(**{name: around.format("sk-key.of_mine=")}), name) == "sk-key.of_mine="


@pytest.mark.parametrize("name", [*KEYS, "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"])
@pytest.mark.parametrize(
    "value", ["sk-first\nsk-second", "sk-\tkey", "sk-\x00key", "sk-\x7fkey", "sk-schlüssel", "sk-…"]
)
def test_keys_that_no_header_can_carry_are_refused(name, value):
    assert "inside" in refused(name, value)


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("around", ["{}", "{}\n", '"{}"', " '{}' "])
def test_addresses_lose_what_surrounds_them(name, around):
    assert plain(settings(**{name: around.format("https://example.com/a")}), name) == "https://example.com/a"


@pytest.mark.parametrize("name", [name for name in ADDRESSES if name != "APP_URL"])
def test_base_addresses_lose_trailing_slashes(name):
    assert plain(settings(**{name: "https://example.com/v1//"}), name) == "https://example.com/v1"


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize(
    "value",
    [
        *("example.com", "localhost:8000", "ftp://example.com", "https:/example.com", "https://", "https:///a"),
        *("https://example.com:port", "https://example.com:99999", "https://example.com:0", "https://exa mple.com"),
        *("https://[::1", "https://[zz]/", "https://1.2.3.999", "https://.example", f"https://{'a' * 64}.com"),
        *(
            "https://example.com\\a",
            "https://exämple.com",
            "https://a.com\nhttps://b.com",
            "https://a.com/#x",
            "<https://a.com>",
        ),
    ],
)
def test_malformed_address_is_refused(name, value):
    assert refused(name, value)


@pytest.mark.parametrize("name", ["SUPABASE_URL", "APP_URL"])
def test_password_in_address_people_see_is_refused(name):
    assert "everybody would see" in refused(name, "https://me:secret@example.com")


@pytest.mark.parametrize("value", ["16", " 16 ", "+16", "16\n", '"16"', "1.6e1", "1_6"])
def test_whole_number_is_read(value):
    assert settings(IMAGE_JOBS_CONCURRENCY=value).concurrency == 16


@pytest.mark.parametrize(
    "value", ["sixteen", "1,000", "16.0", "0", "-1", "1001", "nan", "inf", "1e400", "9" * 5000, "16 x"]
)
def test_number_that_is_none_is_refused(value):
    assert refused("IMAGE_JOBS_CONCURRENCY", value)


@pytest.mark.parametrize(("value", "meant"), [("1", True), (" TRUE ", True), ("on", True), ("0", False), ("No", False)])
def test_flag_is_read(value, meant):
    assert settings(IMAGE_JOBS_DEMO=value).demo is meant


@pytest.mark.parametrize("value", ["2", "maybe", "wahr"])
def test_flag_that_is_none_is_refused(value):
    assert refused("IMAGE_JOBS_DEMO", value) == "it should be 1 or 0"


def test_port_of_a_kubernetes_service_is_not_ours():
    assert settings(IMAGE_JOBS_METRICS_PORT="tcp://10.0.0.7:9090").metrics_port is None


def test_bytes_that_are_no_text_are_refused_by_name():
    assert refused("OPENAI_API_KEY", b"sk-\xff".decode(errors="surrogateescape")) == "it is no UTF-8 text"


@given(name=st.sampled_from(NAMES), value=st.text(max_size=60))
@example("SUPABASE_URL", "http://[")
@example("IMAGE_JOBS_TMP_DIR", "a" * 5000)
@example("IMAGE_JOBS_POLL_TIMEOUT", "86399999999999")
@examples(max_examples=400, deadline=None)
def test_any_text_is_a_start_or_a_sentence(name, value):
    """Any Unicode text of up to 60 characters, surrogates included, for any one variable."""
    start_or_sentence(name, value)


_PIECES = [
    "https",
    "http",
    "://",
    "example.com",
    "[",
    "]",
    "::1",
    ":",
    "80",
    "@",
    "/",
    "?",
    "#",
    "%",
    "%zz",
    " ",
    ".",
    "é",
    "-",
    "x",
]


@given(name=st.sampled_from(ADDRESSES), pieces=st.lists(st.sampled_from(_PIECES), max_size=8))
@examples(max_examples=300, deadline=None)
def test_any_address_is_usable_or_refused(name, pieces):
    """Up to eight pieces of addresses, in any sequence, after `http://`, for any variable that is one."""
    made = start_or_sentence(name, "http://" + "".join(pieces))
    if made is not None and (url := plain(made, name)) is not None:
        assert httpx.URL(str(url)).host


@given(
    name=st.sampled_from([name for name in NAMES if name.startswith("IMAGE_JOBS_")]),
    value=st.from_regex(r"[+-]?[0-9_,.]{0,20}([eE][+-]?[0-9]{1,3})?", fullmatch=True),
)
@examples(max_examples=300, deadline=None)
def test_any_number_is_a_start_or_a_sentence(name, value):
    """Signs, up to 20 digits and separators and an exponent of up to three digits, for any variable of ours."""
    start_or_sentence(name, value)


def start_or_sentence(name: str, value: str) -> Settings | None:
    try:
        return settings(**{name: value})
    except ValidationError as error:
        (wrong,) = error.errors(include_url=False, include_input=False, include_context=False)
        assert wrong["loc"][0] == name
        assert "\n" not in wrong["msg"]
        assert len(value) < 9 or value not in str(error)
        return None
