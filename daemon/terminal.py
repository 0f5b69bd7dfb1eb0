"""Print on terminals of every encoding."""

import codecs
import io
import sys
from typing import TextIO


def spare_characters() -> None:
    """Have stdout and stderr print `\\u2192` for a character that they have not, instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def has_all_characters(stream: TextIO) -> bool:
    """Return whether a stream is in Unicode; on others JSON has to be written in ASCII to stay JSON."""
    try:
        return codecs.lookup(stream.encoding or "ascii").name.startswith("utf")
    except (AttributeError, LookupError):
        return False
