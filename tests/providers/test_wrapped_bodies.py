"""A document, or a picture, is read from a body whatever a server or something in between has put around it."""

import asyncio
import base64
import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from daemon.fetch.encodings import Broken, undone
from daemon.providers.body import NotUnderstood, Part, Picture, Unreadable, read_body
from daemon.providers.event_stream import Document
from daemon.providers.lenient import MOST_DOCUMENTS
from daemon.providers.pictures import find_picture
from daemon.providers.spool import LONGEST, Spool, TooMuch
from tests.fakes.server import picture

PNG = picture()
B64 = base64.b64encode(PNG).decode()
LOGO = f"data:image/png;base64,{B64}"
FIELDS = {"created": 1, "data": [{"b64_json": B64}], "note": "é"}
TEXT = json.dumps(FIELDS, ensure_ascii=False)
DOCUMENT = TEXT.encode()


def deflated(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(body) + compressor.flush()


def multipart(kind: bytes, body: bytes) -> bytes:
    return b"--x\r\nContent-Type: " + kind + b"\r\n\r\n" + body + b"\r\n--x--\r\n"


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def read(body: bytes, spool: Spool, size: int = 1 << 16) -> list[Part]:
    parts = [part async for part in read_body(pieces(body, size), spool)]
    return [each for part in parts for each in (part.unwrapped() if isinstance(part, Document) else [part])]


WRAPPED = [
    DOCUMENT + b'\n<!-- served by "proxy -->',
    DOCUMENT + b"\x00\r\n--",
    b" \n" * 4100 + DOCUMENT,
    b")]}',\n" + DOCUMENT,
    b"while(1);" + DOCUMENT,
    b"callback(" + DOCUMENT + b");",
    b"[" + DOCUMENT + b"]",
    json.dumps(TEXT).encode(),
    json.dumps(TEXT, ensure_ascii=False).encode(),
    multipart(b"application/json", DOCUMENT),
    TEXT.encode("utf-16"),
    TEXT.encode("utf-16-be"),
    TEXT.encode("utf-32"),
    deflated(DOCUMENT),
    zlib.compress(deflated(DOCUMENT)),
]


@pytest.mark.parametrize("longest", [20, LONGEST])
@pytest.mark.parametrize("size", [1, 1 << 16])
@pytest.mark.parametrize("body", WRAPPED, ids=range(len(WRAPPED)))
async def test_document_is_read_whatever_is_around_it(body: bytes, size: int, longest: int, tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=10_000, longest=longest)
    (part,) = await read(body, spool, size)
    assert isinstance(part, Document)
    assert part.event is None
    assert part.fields is not None
    assert part.fields["note"] == "é"
    text = part.fields["data"][0]["b64_json"]
    assert (text in spool) == (longest < LONGEST)
    path = spool.path(text)
    assert (path.read_text() if path else text) == B64


@pytest.mark.parametrize("between", [b"\n", b"", b",\n", b"\r\n\x1e"])
@pytest.mark.parametrize("size", [3, 1 << 16])
async def test_several_documents_are_a_stream(between: bytes, size: int, tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=10_000)
    expected = [Document({"n": 1}, ""), Document(FIELDS, "")]
    assert await read(b'{"n": 1}' + between + DOCUMENT + between, spool, size) == expected
    assert await read(b'[{"n": 1},' + DOCUMENT + b"]", spool, size) == expected


async def test_documents_of_a_body_are_bounded(tmp_path: Path) -> None:
    found: list[Part] = []
    with pytest.raises(NotUnderstood):
        async for part in read_body(pieces(b"{}" * 5000, 1 << 16), Spool(tmp_path, max_bytes=10_000)):
            found.append(part)  # noqa: PERF401 - it raises
    assert len(found) == MOST_DOCUMENTS
    objects: list[object] = [{}] * 5000
    assert len(Document(objects).unwrapped()) == 1


async def test_stream_that_is_cut_is_not_complete(tmp_path: Path) -> None:
    found: list[Part] = []
    with pytest.raises(NotUnderstood):
        async for part in read_body(pieces(b'{"n": 1}\n{"data": "', 4), Spool(tmp_path, max_bytes=10_000)):
            found.append(part)  # noqa: PERF401 - it raises
    assert found == [Document({"n": 1}, "")]


@pytest.mark.parametrize("longest", [20, LONGEST])
@pytest.mark.parametrize(
    "body",
    [
        B64.encode(),
        f"\n{B64}\n".encode(),
        f"data:image/png;base64,{B64}".encode(),
        json.dumps(B64).encode(),
        json.dumps(f"data:image/png;base64,{B64}").encode(),
        f"Here is your picture: ![fox](data:image/png;base64,{B64}).".encode(),
        multipart(b"image/png", PNG),
        b"--x\r\n\r\n{}\r\n--x\nContent-Type: image/png\n\n" + PNG + b"\r\n--x--",
        deflated(PNG),
    ],
    ids=range(9),
)
async def test_picture_is_read_whatever_is_around_it(body: bytes, longest: int, tmp_path: Path) -> None:
    (part,) = await read(body, Spool(tmp_path, max_bytes=10_000, longest=longest), 7)
    assert isinstance(part, Picture)
    assert part.path.read_bytes() == PNG


@pytest.mark.parametrize(
    "body",
    [
        f'Look: {{"data": [{{"b64_json": "{B64}"}}], "usage": {{"in'.encode(),
        DOCUMENT.removesuffix(b"}") + b', "usage": {"in',
        b'{"input": {"image": "' + B64.encode() + b'"}, "data": ["' + B64.encode() + b'", "x',
    ],
    ids=range(3),
)
async def test_picture_counts_though_its_document_breaks_off_behind(body: bytes, tmp_path: Path) -> None:
    (part,) = await read(body, Spool(tmp_path, max_bytes=10_000, longest=20))
    assert isinstance(part, Picture)
    assert part.path.read_bytes() == PNG


@pytest.mark.parametrize(
    "body", [b"What? " + b"*" * LONGEST, b"<svg/>", b'<?xml version="1.0"?>\n<svg width="1">{}</svg>']
)
async def test_text_that_may_be_a_picture_is_kept(body: bytes, tmp_path: Path) -> None:
    (part,) = await read(body, Spool(tmp_path, max_bytes=10_000_000))
    assert isinstance(part, Unreadable)
    assert part.path.read_bytes() == body


@pytest.mark.parametrize("longest", [20, LONGEST])
@pytest.mark.parametrize(
    "body",
    [
        f'<!doctype html><link rel="icon" href="{LOGO}"><h1>Maintenance</h1>'.encode(),
        f'\n<img src="{LOGO}"> 502'.encode(),
        f"HTTP/1.1 503\n\n<HTML><img src={LOGO}>".encode(),
        f'Error: quota. {{"trace": 1, logo: "{LOGO}"'.encode(),
        f'Quota: {{"error": "none left", "logo": "{LOGO}'.encode(),
        f"Quota: {{'error': 1}} {LOGO} ".encode(),
        f'{{"input": {{"image": "{B64}"}}, "data": [{{"b64_json": "iVBOR'.encode(),
        f'{{"image": "{B64}", "error": {{"code": "refused"}}, "id": "'.encode(),
        f'{{"error": {{"code": "refused"}}, "image": "{B64}"'.encode(),
    ],
)
async def test_picture_of_a_page_or_an_error_is_none(body: bytes, longest: int, tmp_path: Path) -> None:
    with pytest.raises(NotUnderstood):
        await read(body, Spool(tmp_path, max_bytes=10_000, longest=longest))


@pytest.mark.parametrize(
    "body", [b"Wait {} a moment", b"<script>x = {}</script>", b"<p>" * LONGEST, b"--x\r\n\r\n--x--"]
)
async def test_page_or_message_with_braces_is_no_document(body: bytes, tmp_path: Path) -> None:
    with pytest.raises(NotUnderstood):
        await read(body, Spool(tmp_path, max_bytes=10_000_000))


@pytest.mark.parametrize("body", [b"\xff\x0a JPEG XL", b"\x1b\x03\x00 brotli", bytes(range(128, 256)) * 9, b"K"])
async def test_bytes_that_are_not_compressed_stay_as_they_are(body: bytes) -> None:
    assert b"".join([piece async for piece in undone(pieces(body, 5))]) == body


async def test_blanks_without_end_are_no_response(tmp_path: Path) -> None:
    read_of = 0

    async def blanks() -> AsyncIterator[bytes]:
        nonlocal read_of
        for start in (b"\xef\xbb\xbf", b""):
            for _ in range(100):
                read_of += 1
                yield start + b" " * (1 << 16)

    with pytest.raises(NotUnderstood):
        _ = [part async for part in read_body(blanks(), Spool(tmp_path, max_bytes=10_000))]
    assert read_of < 30


async def test_bytes_that_stand_for_thousands_are_bounded() -> None:
    made = 0
    with pytest.raises(Broken):
        async for piece in undone(pieces(zlib.compress(zlib.compress(b" " * (1 << 25))), 1 << 16)):
            made += len(piece)
    assert made < 1 << 25


async def test_others_run_while_a_body_is_inflated(tmp_path: Path) -> None:
    pauses = 0

    async def count_pauses() -> None:
        nonlocal pauses
        while True:
            pauses += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(count_pauses())
    body = zlib.compress(b": keeps alive" * 200_000 + b"\n\n" + b'data: {"n": 1}\n\n' * 100)
    assert len(await read(body, Spool(tmp_path, max_bytes=10_000))) == 100
    other.cancel()
    assert pauses > 130


async def test_events_of_a_stream_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(TooMuch):
        await read(b"data: {}\n\n" * 10_001, Spool(tmp_path, max_bytes=10_000))


@pytest.mark.parametrize("before", ["", " ", "(", "\\n", "\\t", "x\\r"])
@pytest.mark.parametrize("escape", ["\\n", "\\u000a"])
def test_picture_is_found_though_escapes_are_all_over_it(before: str, escape: str, tmp_path: Path) -> None:
    text, escaped = tmp_path / "text", escape.join(B64[12:].replace("/", "\\/"))
    text.write_text(f"{before}{B64[:12]}{escape * 12_000}{escaped}")
    found = find_picture(text, Spool(tmp_path, max_bytes=10_000))
    assert found is not None
    assert found.read_bytes() == PNG


@pytest.mark.parametrize("before", ["x", "n", "\\\\x", "_", "="])
def test_middle_of_another_text_is_no_picture(before: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(before + B64)
    assert find_picture(text, Spool(tmp_path, max_bytes=10_000)) is None
