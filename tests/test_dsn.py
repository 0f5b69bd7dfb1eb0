"""DATABASE_URL as operators of other ecosystems have it."""

import inspect
from urllib.parse import quote

import asyncpg.connect_utils
import pytest
import trustme
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from daemon.dsn import WrongAddress, address, understand
from daemon.errors import Misconfigured


def asked(url: str) -> tuple[object, object]:
    """Return what asyncpg makes of an address: where it connects to, and its parameters."""
    parse = asyncpg.connect_utils._parse_connect_dsn_and_args
    nothing = dict.fromkeys(set(inspect.signature(parse).parameters) - {"dsn"})
    return parse(dsn=url, **nothing)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:secret@db.example:6000/app",
        "postgres://me:secret@db.example:6000/app",
        "postgresql+asyncpg://me:secret@db.example:6000/app",
        "postgresql+psycopg2://me:secret@db.example:6000/app/",
        "POSTGRES://me:secret@db.example:6000/app",
        "jdbc:postgresql://db.example:6000/app?user=me&password=secret",
        "host=db.example port=6000 user=me password='secret' dbname=app",
        " postgres://me:secret@db.example:6000/app\n",
    ],
)
def test_schemes_of_other_drivers_are_understood(text):
    ((where,), parameters) = asked(address(text))
    assert where == ("db.example", 6000)
    assert (parameters.user, parameters.password, parameters.database) == ("me", "secret", "app")
    assert understand(text).place == "db.example:6000"


@pytest.mark.parametrize(
    "password",
    ["p@ss#word", "p/w", "a?b", "a?b=c", "a:b", "100%", "[x", "x]y", "@", "##", "p@h/db?x=1", "é ü", "a&b=c+d"],
)
def test_password_need_not_be_percent_encoded(password):
    text = f"postgres://me:{password}@db.example:6000/app?application_name=x@y"
    ((where,), parameters) = asked(address(text))
    assert (where, parameters.user, parameters.password) == (("db.example", 6000), "me", password)
    assert parameters.database == "app"
    assert understand(text).password == password


def test_percent_encoded_password_stays_what_it_is():
    (_, parameters) = asked(address("postgres://me:p%40ss%23%25@h/db"))
    assert parameters.password == "p@ss#%"


@pytest.mark.parametrize(
    "parameter",
    [
        *(
            "pgbouncer=true",
            "connection_limit=1",
            "schema=public",
            "sslaccept=strict",
            "pool_timeout=0",
            "currentSchema=x",
        ),
        *("channel_binding=require", "connect_timeout=10", "prepareThreshold=0", "pgbouncer", "supa=base-pooler.x"),
    ],
)
def test_parameters_of_other_drivers_are_dropped_and_named(parameter):
    found = understand(f"postgres://me:secret@h/db?{parameter}&sslmode=require&statement_timeout=5s")
    assert found.dropped == (parameter.partition("=")[0],)
    (_, parameters) = asked(found.url)
    assert parameters.server_settings == {"statement_timeout": "5s"}
    assert parameters.sslmode.name == "require"


def test_options_of_the_session_are_kept():
    (_, parameters) = asked(address("postgres://me@h/db?options=-c%20search_path%3Dx&app.tenant=7&application_name=me"))
    assert parameters.server_settings == {
        "options": "-c search_path=x",
        "app.tenant": "7",
        "application_name": "me",
    }


@pytest.mark.parametrize(
    ("parameter", "mode"),
    [
        *(("sslmode=disable", "disable"), ("sslmode=PREFER", "prefer"), ("sslmode=no-verify", "require")),
        *(("ssl=true", "require"), ("ssl=false", "disable"), ("ssl=require", "require")),
    ],
)
def test_ssl_of_other_drivers_is_understood(parameter, mode):
    assert asked(address(f"postgres://h/db?{parameter}"))[1].sslmode.name == mode


@pytest.mark.parametrize("mode", ["verify-full", "verify-ca"])
def test_verifying_names_the_file_that_is_missing(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Misconfigured, match=f"sslmode={mode} needs .*~/.postgresql/root.crt"):
        address(f"postgres://h/db?sslmode={mode}")
    with pytest.raises(Misconfigured, match="the file that sslrootcert names is missing"):
        address(f"postgres://h/db?sslmode={mode}&sslrootcert=/nowhere.crt")
    (tmp_path / "key.pem").write_text("no certificate")
    with pytest.raises(Misconfigured, match="holds no certificates"):
        address(f"postgres://h/db?sslmode={mode}&sslrootcert={tmp_path}/key.pem")


@pytest.mark.parametrize("mode", ["verify-full", "verify-ca"])
def test_verifying_works_with_the_certificate(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    for text in (f"sslmode={mode}&sslrootcert=~/ca.crt", f"sslmode={mode}&sslrootcert=system"):
        assert asked(address(f"postgres://h/db?{text}"))[1].sslmode.name == mode.replace("-", "_")
    (tmp_path / ".postgresql").mkdir()
    (tmp_path / "ca.crt").rename(tmp_path / ".postgresql/root.crt")
    assert asked(address(f"postgres://h/db?sslmode={mode}"))[1].sslmode.name == mode.replace("-", "_")


@pytest.mark.parametrize("name", ["sslcert", "sslkey", "sslcrl"])
@pytest.mark.parametrize(("file", "wrong"), [("/nope", "missing"), (__file__, "no "), ("~nobody_at_all/x", "missing")])
def test_certificates_of_the_environment_are_looked_at(name, file, wrong):
    environ = {"PGSSLMODE": "require", "PGSSLCERT": __file__, f"PG{name.upper()}": file}
    if name == "sslcrl":
        del environ["PGSSLCERT"]
    with pytest.raises(WrongAddress, match=f"PG{name.upper()}") as refused:
        understand("postgres://h/db", environ)
    assert wrong in str(refused.value)
    understand("postgres://h/db", {**environ, "PGSSLMODE": "disable"})
    understand("postgres://h/db?sslmode=disable", environ)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("postgres://me:secret@h:port/db", "port"),
        ("postgres://me:secret@h:99999/db", "port"),
        ("postgres://me:secret@exa mple/db", "host"),
        ("postgres://me:secret@2001:db8::1/db", "IPv6"),
        ("postgres://me:secret@[2001/db", "port"),
        ("postgres://me:secret@h/db#secret", "#"),
        ("postgres://me:[YOUR-PASSWORD]@h/db", "placeholder"),
        ("postgres://me:secret@h/db?sslmode=on-and-off", "sslmode"),
        ("postgres://me:secret@h/db?target_session_attrs=best", "target_session_attrs"),
        ("postgres://me:secret@h/db%00", "NUL"),
        ("mysql://me:secret@h/db", "neither postgresql:// nor"),
        ("https://me.supabase.co", "website"),
        ("Host=h;Username=me;Password=secret", "neither postgresql:// nor"),
    ],
)
def test_wrong_part_is_named_and_never_repeated(text, part):
    with pytest.raises(Misconfigured, match=r"^DATABASE_URL is wrong \(") as raised:
        address(text)
    assert part in raised.value.message
    assert "secret" not in raised.value.message + raised.value.hint


_PIECES = [
    "postgres://",
    "jdbc:",
    "me",
    ":",
    "p",
    "@",
    "h",
    "[::1]",
    "[",
    ",",
    "5432",
    "/",
    "db",
    "?",
    "&",
    "sslmode=",
    "host=",
    "port=",
    "require",
]
_PIECES += [
    "pgbouncer=true",
    "=",
    "#",
    "%",
    "%00",
    "%ff",
    "é",
    " ",
    "ssl_min_protocol_version=",
    "TLSv1.2",
    "sslcert=",
    "service=",
    "user=",
]


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(_PIECES), max_size=12).map("".join)), st.booleans())
@example("h:1,h:2/db?host=a,b&port=1,2,3", True)
@example("?port=1,2&host=a", True)
@examples(max_examples=600, deadline=None)
def test_any_text_is_an_address_or_refused(text, begun):
    """Any text of up to 40 characters and up to twelve pieces of addresses, with and without a scheme before it."""
    try:
        found = understand(f"postgres://{text}" if begun else text)
    except WrongAddress as error:
        assert "\n" not in str(error)
        assert str(error)
        if len(text) > 20:
            assert text not in str(error)
    else:
        asked(found.url)
        assert understand(found.url).url == found.url


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
@examples(max_examples=200, deadline=None)
def test_any_encoded_password_is_kept(password):
    """Any password of up to 20 characters without NUL and surrogates, percent-encoded."""
    (_, parameters) = asked(address(f"postgres://me:{quote(password, safe='')}@h/db?pgbouncer=true"))
    assert parameters.password == password
