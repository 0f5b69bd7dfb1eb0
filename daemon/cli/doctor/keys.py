"""Check of the keys of the Supabase project: which kind each is, whose it is, and whether it is still good.

Signatures are not verified: only the project's servers can do that. A key is never repeated.
"""

import base64
import binascii
import json
import time
from typing import Any, cast
from urllib.parse import urlsplit

from pydantic import SecretStr

from daemon.cli.doctor.finding import Finding
from daemon.settings import Settings

WHERE = "The project's API settings have both."


def check_project_keys(settings: Settings) -> list[Finding]:
    """Compare the kind of each key that is set with the kind that is needed there."""
    wanted = (
        (
            "SUPABASE_SERVICE_ROLE_KEY",
            settings.service_role_key,
            "service_role",
            "the secret key (sb_secret_…) or service_role",
        ),
        ("SUPABASE_ANON_KEY", settings.anon_key, "anon", "the publishable key (sb_publishable_…) or anon"),
    )
    return [_judge(settings, name, key, role, cure) for name, key, role, cure in wanted if key is not None]


def _judge(settings: Settings, name: str, key: SecretStr, wanted: str, cure: str) -> Finding:
    kind, claims = _kind(key.get_secret_value())
    cure = f"Set it to {cure}. {WHERE}"
    if kind is None:
        return Finding("keys", "info", f"{name} has the form of no key of Supabase's, so it cannot be judged.", cure)
    role = claims.get("role")
    if role != wanted:
        if wanted == "anon":
            secret = role == "service_role"
            trouble = "opens everything" if secret else "expires"
            message = f"{name} is {kind}, which {trouble}, and this one stands in the addresses of webhooks."
            if secret:
                cure = f"{cure} Then roll the secret one: it may have been seen."
            return Finding("keys", "problem", message, cure)
        return Finding("keys", "problem", f"{name} is {kind}, which may not upload images.", cure)
    expires = claims.get("exp")
    if isinstance(expires, int | float) and expires < time.time():
        return Finding("keys", "problem", f"{name} has expired.", cure)
    project = _project(settings.supabase_url)
    if project and claims.get("ref") not in (None, project):
        message = f"{name} is of another project than SUPABASE_URL names."
        return Finding("keys", "problem", message, "Take address and keys from the same project's API settings.")
    return Finding("keys", "ok", f"{name} is {kind}.")


def _kind(key: str) -> tuple[str | None, dict[str, Any]]:
    """Return what a key is, for a sentence, and its claims; None for a text that has no form of a key."""
    if key.startswith("sb_secret_"):
        return "a secret key", {"role": "service_role"}
    if key.startswith("sb_publishable_"):
        return "a publishable key", {"role": "anon"}
    claims = _claims(key)
    role = claims.get("role")
    if role not in ("anon", "authenticated", "service_role"):
        return None, {}
    return ("the token of a user" if role == "authenticated" else f"a key of the role {role}"), claims


def _claims(key: str) -> dict[str, Any]:
    """Return what a JWT says; nothing for a text that is none."""
    parts = key.split(".")
    try:
        claims: object = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (IndexError, binascii.Error, ValueError):
        return {}
    return cast("dict[str, Any]", claims) if isinstance(claims, dict) else {}


def _project(url: str | None) -> str | None:
    """Return the reference of a hosted project; None for every other address."""
    host = urlsplit(url or "").hostname or ""
    reference, _, domain = host.partition(".")
    return reference if domain == "supabase.co" else None
