"""A picture is read from however a server spells it."""

import base64
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.providers.base64_stream import ImageTooLarge
from daemon.providers.body import NotUnderstood, Part, Picture, Unreadable, read_body
from daemon.providers.event_stream import Document
from daemon.providers.lenient import parse_json
from daemon.providers.pictures import NotAPicture, is_url, save_picture
from daemon.providers.spool import LONGEST, Spool, TooMuch
from tests.fakes.server import picture

PNG = picture() + b"\0"  # its base64 ends with padding
FAST = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


async def pieces(body: bytes, sizes: list[int]) -> AsyncIterator[bytes]:
    sizes = [*sizes]
    while body:
        size = sizes.pop() if sizes else len(body)
        yield body[:size]
        body = body[size:]


async def read(body: bytes, spool: Spool, sizes: list[int] | None = None) -> list[Part]:
    return [part async for part in read_body(pieces(body, sizes or []), spool)]


@st.composite
def base64_spellings(draw: st.DrawFn, data: bytes) -> str:
    """Any spelling of base64: its alphabet, padding, line breaks, what stands before it, percent signs."""
    text = base64.b64encode(data).decode()
    if draw(st.booleans()):
        text = text.translate(str.maketrans("+/", "-_"))
    if draw(st.booleans()):
        text = text.rstrip("=")
    prefix = draw(st.sampled_from(["", "data:image/png;base64,", "DATA:image/jpeg;name=a.b;BASE64,", "base64,"]))
    if prefix.startswith("data") and draw(st.booleans()):
        text = quote(text)
    width, line_end = draw(st.sampled_from([4, 60, 64, 76, 77])), draw(st.sampled_from(["", "\n", "\r\n", " ", "\t"]))
    if line_end:
        text = line_end.join(text[start : start + width] for start in range(0, len(text), width))
    blank = draw(st.sampled_from(["", " ", "\n"]))
    return blank + prefix + text + blank


def json_spelling(text: str, escape: Iterator[int]) -> str:
    """Return a JSON string in which some characters are escaped, in one of the ways that JSON has."""
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "/": "\\/"}

    def spelled(character: str) -> str:
        way = next(escape)
        if way == 1 or (character in short and character != "/" and way != 2):
            return short.get(character, character)
        return f"\\u{ord(character):04{'x' if way == 2 else 'X'}}" if way in (2, 3) else character

    return '"' + "".join(spelled(character) for character in text) + '"'


@st.composite
def json_strings(draw: st.DrawFn, data: bytes) -> str:
    """Any JSON string of any spelling of base64: characters are escaped here and there, or all of them."""
    text = draw(base64_spellings(data))
    rhythm = draw(st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), min_size=1, max_size=12))
    return json_spelling(text, (rhythm[index % len(rhythm)] for index in range(1 << 62)))


@FAST
@given(
    spelled=json_strings(PNG),
    sizes=st.lists(st.integers(1, 60), max_size=30),
    longest=st.sampled_from([20, 64, LONGEST]),
)
async def test_any_json_string_of_any_base64_is_the_picture(
    spelled: str, sizes: list[int], longest: int, tmp_path: Path
) -> None:
    """Any JSON string (escapes of every kind) of any base64 (alphabet, padding, line ends, prefix), in memory or on disk, in any
    pieces."""
    spool = Spool(tmp_path, max_bytes=10_000, longest=longest)
    (document,) = await read(b'{"b64_json": ' + spelled.encode() + b', "n": 1}', spool, sizes)
    assert isinstance(document, Document)
    assert document.fields is not None
    assert (document.fields["b64_json"] in spool) == (longest < LONGEST)
    assert document.fields["n"] == 1
    assert (await save_picture(document.fields["b64_json"], spool)).read_bytes() == PNG


async def test_texts_with_padding_of_their_own_are_one_picture(tmp_path: Path) -> None:
    text = "".join(base64.b64encode(PNG[start : start + 50]).decode() for start in range(0, len(PNG), 50))
    assert (await save_picture(text, Spool(tmp_path, max_bytes=10_000))).read_bytes() == PNG


@pytest.mark.parametrize("text", ["***", "AAAA", "<svg/>", base64.b64encode(b"<html>").decode(), "="])
async def test_text_that_is_no_picture_is_kept(text: str, tmp_path: Path) -> None:
    with pytest.raises(NotAPicture) as caught:
        await save_picture(text, Spool(tmp_path, max_bytes=10_000))
    kept = caught.value.path.read_bytes()
    assert kept in (text.encode(), base64.b64decode(text.encode() + b"==", validate=False))


async def test_a_long_text_that_is_no_picture_is_kept_as_it_came(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=LONGEST * 4)
    (document,) = await read(json.dumps({"b64_json": "*" * (LONGEST + 1)}).encode(), spool)
    assert isinstance(document, Document)
    assert document.fields is not None
    with pytest.raises(NotAPicture) as caught:
        await save_picture(document.fields["b64_json"], spool)
    assert caught.value.path.read_bytes() == b"*" * (LONGEST + 1)


async def test_a_picture_above_the_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageTooLarge):
        await save_picture(base64.b64encode(PNG).decode(), Spool(tmp_path, max_bytes=len(PNG) - 1))


async def test_bytes_on_disk_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(TooMuch):
        await read(b'{"b64_json": "' + b"A" * 400_000 + b'"}', Spool(tmp_path, max_bytes=1000))
    with pytest.raises(TooMuch):
        await read(b"{" + b" " * 5_000_000, Spool(tmp_path, max_bytes=1000))


@pytest.mark.parametrize(("text", "url"), [("https://a/b.png", True), (" HTTP://a", True), ("file:///a", True)])
def test_an_address_is_told_from_a_picture(text: str, url: bool) -> None:
    assert is_url(text) == url
    assert not is_url("data:image/png;base64,AAAA")
    assert not is_url(base64.b64encode(PNG).decode())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
async def test_a_body_that_is_a_picture_is_one(kind: str, tmp_path: Path) -> None:
    (part,) = await read(picture(kind=kind), Spool(tmp_path, max_bytes=100_000), [1] * 100)
    assert isinstance(part, Picture)
    assert part.path.read_bytes() == picture(kind=kind)


async def test_a_body_of_unknown_bytes_is_kept(tmp_path: Path) -> None:
    (part,) = await read(b"\xff\x0a JPEG XL", Spool(tmp_path, max_bytes=100_000))
    assert isinstance(part, Unreadable)
    assert part.path.read_bytes() == b"\xff\x0a JPEG XL"


@pytest.mark.parametrize("body", [b"<html>Bad gateway</html>", b"Bad gateway", b'{"b64_json": "AAAA', b"{]"])
async def test_a_page_is_not_understood(body: bytes, tmp_path: Path) -> None:
    with pytest.raises(NotUnderstood):
        await read(body, Spool(tmp_path, max_bytes=100_000))


async def test_a_complete_document_counts_though_the_body_breaks_off(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b'data: {"n": 1}'
        raise ConnectionError

    found: list[Part] = []
    with pytest.raises(ConnectionError):
        async for part in read_body(broken(), Spool(tmp_path, max_bytes=1)):
            found.append(part)  # noqa: PERF401 - it raises
    assert found == [Document({"n": 1}, "")]


@FAST
@given(
    events=st.lists(
        st.tuples(st.sampled_from(["", "a.completed"]), st.dictionaries(st.text(max_size=5), st.text(max_size=9)))
    ),
    line_end=st.sampled_from([b"\n", b"\r", b"\r\n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    space=st.sampled_from([b"", b" "]),
    comment=st.sampled_from([b": it's \"alive", b":", b"retry: 5", b"unknown", b"x" * 300]),
    last=st.booleans(),
    sizes=st.lists(st.integers(1, 30), max_size=40),
)
async def test_event_streams_are_read_by_the_standard(
    events: list[tuple[str, dict[str, str]]],
    line_end: bytes,
    mark: bytes,
    space: bytes,
    comment: bytes,
    *,
    last: bool,
    sizes: list[int],
    tmp_path: Path,
) -> None:
    """Any JSON objects as events, with every line end, with and without marks, comments, spaces, the last empty line."""
    lines = [b"event: first", b"data:" + space + b"{}", b""]
    for name, document in events:
        text = json.dumps(document, indent=1).split("\n")
        lines += [comment, *([b"event:" + name.encode()] if name else [])]
        lines += [*(b"data:" + space + line.encode() for line in text), b""]
    body = mark + line_end.join(lines) + (line_end if last else b"")
    if not last:
        body = body.rstrip(b"\r\n")

    found = await read(body, Spool(tmp_path, max_bytes=100_000), sizes)

    assert found == [Document({}, "first"), *(Document(document, name) for name, document in events)]


async def test_events_that_are_not_json_are_passed_over(tmp_path: Path) -> None:
    body = b"data: ping\n\ndata: [DONE]\n\ndata: {}\n\ndata: {\n"
    assert await read(body, Spool(tmp_path, max_bytes=1)) == [Document({}, "")]


@pytest.mark.parametrize("text", [b"[" * 100_000, b"9" * 10_000, b'"\\ud800"', b'{"a": NaN}', b'"\xff"', b'"a\nb"'])
def test_json_that_breaks_readers_is_read_or_refused(text: bytes) -> None:
    try:
        json.dumps(parse_json(text), ensure_ascii=False).encode()
    except ValueError:
        assert text.startswith(b"[")
