"""The first bytes of a file say what it is; a name or a Content-Type does not."""

ENOUGH = 64
"""Bytes of a file that decide."""
_PLAIN = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"))


def image_type(head: bytes) -> str | None:
    """Return the content type of an image that we take, by the first `ENOUGH` bytes of its file; None for anything else."""
    for start, name in _PLAIN:
        if head.startswith(start):
            return name
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image/webp"
    # An ISO media file names its brand, then the compatible ones. HEIC is of that family too, and not taken.
    if head[4:8] == b"ftyp" and any(brand in head[8 : int.from_bytes(head[:4], "big")] for brand in (b"avif", b"avis")):
        return "image/avif"
    return None


def is_text(head: bytes) -> bool:
    """Return whether a file begins as a text does: a page, a message."""
    if b"\x00" in head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3  # a character that the end of `head` cuts
    return all(character.isprintable() or character.isspace() for character in head.decode())
