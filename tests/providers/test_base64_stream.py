import base64
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.providers.base64_stream import Base64Stream, BrokenImage, EventStream


def streamed(text: bytes, sizes: list[int], folder: Path, key: str = "b64_json") -> tuple[bytes, list[bytes]]:
    rest = b""
    with Base64Stream(folder, max_bytes=10_000, key=key) as stream:
        while text:
            size = sizes.pop() if sizes else len(text)
            rest += stream.feed(text[:size])
            text = text[size:]
        rest += stream.finish()
    return rest, [file.read_bytes() for file in stream.files]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    images=st.lists(st.binary(max_size=300), max_size=3),
    key=st.sampled_from(["b64_json", "data"]),
    prompt=st.text(max_size=40)
    | st.sampled_from(['"b64_json"', '"b64', '\\"b64_json\\": \\"', '"data": "', "b64_json"]),
    sizes=st.lists(st.integers(1, 40)),
    indent=st.sampled_from([None, 2]),
    escaped=st.booleans(),
)
def test_images_are_taken_out_wherever_the_chunks_break(
    images: list[bytes], key: str, prompt: str, sizes: list[int], indent: int | None, *, escaped: bool, tmp_path: Path
) -> None:
    encoded = [base64.b64encode(image).decode() for image in images]
    items = [{key: text, "revised_prompt": prompt} for text in encoded]
    text = json.dumps({"data": items, "usage": {"output_tokens": 1}}, indent=indent)
    if escaped:
        for plain in encoded:
            text = text.replace(f'"{plain}"', '"' + plain.replace("/", "\\/") + '"')

    rest, files = streamed(text.encode(), sizes, tmp_path, key)

    left = [{key: f"{number:04}", "revised_prompt": prompt} for number in range(len(images))]
    assert json.loads(rest) == {"data": left, "usage": {"output_tokens": 1}}
    assert files == images


def test_an_image_that_is_null_is_left_alone(tmp_path: Path) -> None:
    assert streamed(b'{"b64_json": null, "url": "x"}', [], tmp_path) == (b'{"b64_json": null, "url": "x"}', [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"b64_json": "AAAA', "breaks off"),
        (b'{"b64_json": "AAA"}', "not base64"),
        (b'{"b64_json": "AA\\nAA"}', "not base64"),
        (b'{"b64_json": "' + b"AAAA" * 4000 + b'"}', "larger than 10,000 bytes"),
    ],
)
def test_a_broken_image_is_an_error(text: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(BrokenImage, match=said):
        streamed(text, [5, 9], tmp_path)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_are_split_wherever_the_chunks_break(newline: bytes) -> None:
    text = newline.join([b": hello", b"event: one", b"data: 1", b"", b"data:2", b"data: 3", b"", b"data: cut off"])

    for size in range(1, len(text)):
        stream = EventStream()
        events = [event for start in range(0, len(text), size) for event in stream.feed(text[start : start + size])]
        assert events == [b"1", b"2\n3"]
