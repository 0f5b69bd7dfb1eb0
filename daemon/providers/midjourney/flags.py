"""Remove flags from the texts of a prompt; the harmless ones are kept.

The others would override fields of the promptSpec (`--ar`), or draw, and charge, several times (`--repeat`, `{red, blue}`).
"""

import re

from daemon.providers.prompts import Warn

_NUMBER = r"\d{1,4}(?:\.\d{1,2})?"
_ALLOWED = {
    "chaos": _NUMBER,
    "exp": _NUMBER,
    "iw": _NUMBER,
    "raw": "",
    "stop": _NUMBER,
    "style": r"[a-z]{1,20}",
    "stylize": _NUMBER,
    "tile": "",
    "weird": _NUMBER,
}
"""Flag → pattern of its value."""
_SHORT = {"c": "chaos", "s": "stylize", "w": "weird"}
_FIELDS = {
    "ar": "aspectRatio",
    "aspect": "aspectRatio",
    "no": "negativePrompt",
    "seed": "seed",
    "niji": "processor",
    "v": "processor",
    "version": "processor",
    "q": "quality",
    "quality": "quality",
}
"""Flag → the field of the promptSpec that replaces it."""
_FLAG = re.compile(r"(?:^|(?<=\s))--+(?P<name>\w+)(?P<value>.*?)(?=\s--+\w|$)", re.DOTALL)
# Each run of dashes is looked at once: from every dash of it anew, that takes the square of their number.
_LOOKS_LIKE_ONE = re.compile(
    r"(?:(?<!-)(?:(?<=\S)-{2,}|-{3,})|(?<![—–―])[—–―]+)(?=\w)"  # noqa: RUF001 - phones make a long dash of two short ones
)
_BRACES = str.maketrans("{}", "()")


def take_flags(text: str, warn: Warn, *, field: str, allow: bool = True) -> tuple[str, dict[str, str]]:
    """Take the flags out of a text.

    Args:
        text: A field of the promptSpec.
        warn: Called for each flag that is removed.
        field: The name of that field.
        allow: False where no flag may be kept.

    Returns:
        The text without flags, and those that are kept by their names, each like `--stylize 50`.
    """
    passed: dict[str, str] = {}

    def one(found: re.Match[str]) -> str:
        name, value = found["name"].lower(), found["value"]
        name = _SHORT.get(name, name)
        wanted = _ALLOWED.get(name) if allow else None
        # What follows a value that is complete belongs to the text again.
        fits = re.match(rf"\s*(?P<value>{wanted})(?![^\s,])", value) if wanted is not None else None
        if fits:
            passed[name] = f"--{name} {fits['value']}".rstrip()
            return value[fits.end() :]
        instead = f"; use {_FIELDS[name]}" if name in _FIELDS else ""
        warn(
            f"{found[0].strip()[:80]} was removed from the prompt: this flag is not passed on{instead}.",
            field=field,
            feature="removed",
        )
        return ""

    text = _LOOKS_LIKE_ONE.sub(r"\g<0> ", text)
    if "{" in text or "}" in text:
        warn("Braces draw a picture for each of their words; they became brackets.", field=field, feature="replaced")
        text = text.translate(_BRACES)
    return " ".join(_FLAG.sub(one, text).split()), passed
