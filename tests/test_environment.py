"""`.env` files of every encoding, and names that are a slip of the pen."""

import codecs

import pytest

from daemon.environment import read_file, remarks
from daemon.errors import Misconfigured
from daemon.settings import Settings

NAMES = [str(field.alias) for field in Settings.model_fields.values()]
TEXT = "# clé\nexport OPENAI_API_KEY='sk-key'\nIMAGE_JOBS_DEMO=1\n"


@pytest.mark.parametrize(
    "raw",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.encode("latin-1"),
        TEXT.replace("\n", "\r\n").encode(),
    ],
)
def test_env_file_is_read_in_every_encoding(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / ".env").write_bytes(raw)
    made = Settings.model_validate({})
    assert made.demo
    assert made.openai_api_key is not None
    assert made.openai_api_key.get_secret_value() == "sk-key"


@pytest.mark.parametrize(
    "raw", [b"A=1\n\0\x01\x02", b"\xff\xfe\x00", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xfe\x00\xd8\x00\xd8"]
)
def test_env_file_that_is_no_text_is_a_sentence(raw, tmp_path):
    (tmp_path / ".env").write_bytes(raw)
    with pytest.raises(Misconfigured, match=r"\.env is (no text file|damaged)"):
        read_file(tmp_path / ".env")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("IMAGE_JOBS_CONCURENCY", "IMAGE_JOBS_CONCURRENCY"),
        ("IMAGE_JOB_CONCURRENCY", "IMAGE_JOBS_CONCURRENCY"),
        ("IMAGE_JOBS_POLL_TIME_OUT", "IMAGE_JOBS_POLL_TIMEOUT"),
        ("OPENAI_APIKEY", "OPENAI_API_KEY"),
        ("SUPBASE_URL", "SUPABASE_URL"),
        ("SUPABASE_SERVICE_KEY", "SUPABASE_SERVICE_ROLE_KEY"),
        ("WEBHOOK_SECRETS", "WEBHOOK_SECRET"),
        ("OPENAI_API_BASE", "OPENAI_BASE_URL"),
        ("DATABSE_URL", "DATABASE_URL"),
    ],
)
def test_misspelt_name_is_pointed_out(name, meant):
    assert remarks({name: "secret"}, NAMES) == [f"{name} is ignored; did you mean {meant}?"]


def test_unknown_name_of_ours_is_pointed_out():
    assert remarks({"IMAGE_JOBS_FROBNICATE": "1"}, NAMES) == [
        "IMAGE_JOBS_FROBNICATE is ignored: this version has no such setting."
    ]


@pytest.mark.parametrize(
    "found",
    [
        dict.fromkeys(NAMES, "1"),
        {"SUPABASE_URLS": "x", "SUPABASE_URL": "https://example.com"},
        {
            "IMAGE_JOBS_SERVICE_HOST": "10.0.0.1",
            "IMAGE_JOBS_PORT_80_TCP_ADDR": "10.0.0.1",
            "IMAGE_JOBS_PORT": "tcp://x",
        },
        {
            "IMAGE_JOBS_TOKEN": "x",
            "PATH": "x",
            "AZURE_OPENAI_API_KEY": "x",
            "NEXT_PUBLIC_SUPABASE_URL": "x",
            "API_URL": "x",
        },
        {"OPENAI_WEBHOOK_SECRET": "x", "SUPABASE_JWT_SECRET": "x", "GOOGLE_CLOUD_PROJECT": "x", "OPENAI_LOG": "x"},
    ],
)
def test_names_of_others_are_left_alone(found):
    assert remarks(found, NAMES) == []
