"""doctor: the kind of each key of the project, read from its form, and never repeated."""

import time

import jwt
import pytest

from daemon.cli.doctor.keys import check_project_keys
from daemon.settings import Settings

URL = "https://abcdefghij.supabase.co"


def legacy(role: str, **claims: object) -> str:
    return jwt.encode({"iss": "supabase", "role": role, "ref": "abcdefghij", **claims}, "x" * 32, "HS256")


def findings(**keys: str) -> list[tuple[str, str]]:
    found = check_project_keys(Settings.model_validate({"SUPABASE_URL": URL, **keys}))
    for key in keys.values():
        assert key not in " ".join(finding.message + finding.cure for finding in found)
    return [(finding.state, finding.message) for finding in found]


SERVICE, ANON = "SUPABASE_SERVICE_ROLE_KEY", "SUPABASE_ANON_KEY"


@pytest.mark.parametrize(
    ("name", "key", "state", "message"),
    [
        (SERVICE, "sb_secret_abc_def", "ok", f"{SERVICE} is a secret key."),
        (SERVICE, legacy("service_role"), "ok", f"{SERVICE} is a key of the role service_role."),
        (SERVICE, legacy("anon"), "problem", f"{SERVICE} is a key of the role anon, which may not upload images."),
        (
            SERVICE,
            legacy("authenticated"),
            "problem",
            f"{SERVICE} is the token of a user, which may not upload images.",
        ),
        (SERVICE, "sb_publishable_abc", "problem", f"{SERVICE} is a publishable key, which may not upload images."),
        (SERVICE, legacy("service_role", exp=time.time() - 9), "problem", f"{SERVICE} has expired."),
        (
            SERVICE,
            legacy("service_role", ref="another"),
            "problem",
            f"{SERVICE} is of another project than SUPABASE_URL names.",
        ),
        (SERVICE, "s3cr3t", "info", f"{SERVICE} has the form of no key of Supabase's, so it cannot be judged."),
        (SERVICE, "a.b.c", "info", f"{SERVICE} has the form of no key of Supabase's, so it cannot be judged."),
        (SERVICE, "a.W10.c", "info", f"{SERVICE} has the form of no key of Supabase's, so it cannot be judged."),
        (ANON, "sb_publishable_abc", "ok", f"{ANON} is a publishable key."),
        (ANON, legacy("anon"), "ok", f"{ANON} is a key of the role anon."),
        (
            ANON,
            "sb_secret_abc",
            "problem",
            f"{ANON} is a secret key, which opens everything, and this one stands in the addresses of webhooks.",
        ),
        (
            ANON,
            legacy("service_role"),
            "problem",
            f"{ANON} is a key of the role service_role, which opens everything, and this one stands in the addresses of webhooks.",
        ),
        (
            ANON,
            legacy("authenticated"),
            "problem",
            f"{ANON} is the token of a user, which expires, and this one stands in the addresses of webhooks.",
        ),
    ],
)
def test_a_key_of_another_kind_is_named(name: str, key: str, state: str, message: str) -> None:
    assert findings(**{name: key}) == [(state, message)]


@pytest.mark.parametrize(("role", "rolled"), [("service_role", True), ("authenticated", False)])
def test_only_a_secret_key_is_to_be_rolled(role: str, rolled: bool) -> None:
    (found,) = check_project_keys(Settings.model_validate({"SUPABASE_URL": URL, ANON: legacy(role)}))
    assert "the publishable key" in found.cure
    assert ("roll the secret one" in found.cure) is rolled


def test_both_keys_are_judged_and_missing_ones_left_to_others() -> None:
    assert [state for state, _ in findings(**{SERVICE: legacy("anon"), ANON: legacy("service_role")})] == [
        "problem"
    ] * 2
    assert findings() == []
