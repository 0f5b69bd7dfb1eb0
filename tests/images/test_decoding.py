"""Images as they come from outside: real ones of every kind, and whatever else a provider may send."""

import hashlib
import io
import random
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageOps, ImageStat

from daemon import images
from daemon.errors import Refused, Retryable

LIMITS = {"max_bytes": 10_000_000, "max_pixels": 10_000_000}
KINDS = {
    "image/png": ("PNG", "png"),
    "image/jpeg": ("JPEG", "jpg"),
    "image/webp": ("WEBP", "webp"),
    "image/gif": ("GIF", "gif"),
    "image/avif": ("AVIF", "avif"),
}


def picture(kind: str = "PNG", size: tuple[int, int] = (60, 40), mode: str = "RGB", **options: object) -> bytes:
    """Noise, which no format can compress away: cutting it off anywhere cuts pixels off."""
    noise = Image.frombytes("RGB", size, random.Random(1).randbytes(size[0] * size[1] * 3))
    buffer = io.BytesIO()
    noise.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def claimed_size_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(1000)))
    framed = (struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "download"


@pytest.mark.parametrize(("content_type", "kind", "extension"), [(t, *k) for t, k in KINDS.items()])
def test_an_image_is_known_by_its_bytes(file: Path, content_type: str, kind: str, extension: str) -> None:
    data = picture(kind)
    file.write_bytes(data)
    assert images.inspect(file, **LIMITS) == images.ImageInfo(
        content_type, extension, 60, 40, len(data), hashlib.sha256(data).hexdigest()
    )


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS.values()])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_truncated_image_is_refused(file: Path, kind: str, part: float) -> None:
    data = picture(kind)
    file.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(Retryable) as caught:
        images.inspect(file, **LIMITS)
    assert caught.value.code == "invalid_image"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"<!doctype html><title>502 Bad Gateway</title>",
        b'{"error": "try again"}',
        b"BM" + bytes(100),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"RIFF\xff\xff\xff\xffWEBP",
        b"GIF89a",
        b"\x00\x00\x00\x1cftypavif",
        b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(40),
    ],
)
def test_what_is_no_image_is_worth_another_try(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with pytest.raises(Retryable) as caught:
        images.inspect(file, **LIMITS)
    assert caught.value.code == "invalid_image"
    assert caught.value.message.endswith(".")
    assert caught.value.hint


def test_a_page_that_begins_like_an_image_is_refused(file: Path) -> None:
    file.write_bytes(b"GIF89a/*<html><script>alert(1)</script>*/")
    with pytest.raises(Retryable):
        images.inspect(file, **LIMITS)


def test_a_file_over_the_limit_is_refused_for_good(file: Path) -> None:
    file.write_bytes(picture())
    with pytest.raises(Refused, match="the limit is") as caught:
        images.inspect(file, max_bytes=100, max_pixels=10_000)
    assert caught.value.code == "image_too_large"


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (20_000, 20_000), (10_001, 1_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(file: Path, size: tuple[int, int]) -> None:
    file.write_bytes(claimed_size_png(*size))
    with pytest.raises(Refused, match="pixels") as caught:
        images.inspect(file, **LIMITS)
    assert caught.value.code == "image_too_large"
    assert caught.value.data == {"width": size[0], "height": size[1]}


def test_our_limit_counts_and_not_that_of_pillow(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    file.write_bytes(picture())
    assert images.inspect(file, **LIMITS).width == 60


def test_an_image_on_its_side_is_measured_and_thumbnailed_upright(file: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file.write_bytes(picture("JPEG", size=(2000, 1000), exif=exif))
    info = images.inspect(file, **LIMITS)
    assert (info.width, info.height) == (1000, 2000)
    images.thumbnail(file, tmp_path / "thumbnail.webp")
    with Image.open(tmp_path / "thumbnail.webp") as small:
        assert small.size == (256, 512)
        assert not small.getexif()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_thumbnail_is_upright_whichever_way_the_image_lies(file: Path, tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = Image.new("RGB", (64, 32), "blue")
    seen.paste("red", (0, 0, 16, 16))
    seen.save(file, "PNG", exif=exif)
    with Image.open(file) as lying:
        upright = ImageOps.exif_transpose(lying)
        images.thumbnail(file, tmp_path / "thumbnail.webp")
    with Image.open(tmp_path / "thumbnail.webp") as small:
        assert small.size == upright.size
        difference = ImageChops.difference(small.convert("RGB"), upright.convert("RGB"))
        assert max(ImageStat.Stat(difference).mean) < 10


def test_exif_that_can_be_read_but_not_written_stops_no_thumbnail(file: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    good = picture("JPEG", exif=exif)
    entry = good.index(b"\x01\x0e\x00\x02")
    # A text whose type says that it is a fraction.
    file.write_bytes(good[:entry] + b"\x01\x0e\x00\x05\x00\x00\x00\x01" + good[entry + 8 :])
    assert images.inspect(file, **LIMITS).height == 60
    images.thumbnail(file, tmp_path / "thumbnail.webp")


def test_whatever_is_wrong_with_an_image_is_an_error_of_ours(file: Path) -> None:
    good = picture("AVIF")
    refused = 0
    for place in range(12, 400):
        file.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        try:
            images.inspect(file, **LIMITS)
        except (Refused, Retryable):
            refused += 1
    assert refused > 100


def test_trouble_with_the_disk_is_not_the_image_s_fault(file: Path, tmp_path: Path) -> None:
    file.write_bytes(picture())
    with pytest.raises(IsADirectoryError):
        images.thumbnail(file, tmp_path)
    with pytest.raises(FileNotFoundError):
        images.inspect(tmp_path / "gone", **LIMITS)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_every_colour_mode_gets_a_thumbnail(file: Path, tmp_path: Path, mode: str) -> None:
    file.write_bytes(picture(size=(1024, 512), mode=mode))
    images.thumbnail(file, tmp_path / "thumbnail.webp")
    with Image.open(tmp_path / "thumbnail.webp") as small:
        assert (small.format, small.size) == ("WEBP", (512, 256))


def test_a_transparent_image_stays_transparent(file: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (600, 600), (255, 0, 0, 0)).save(file, "PNG")
    images.thumbnail(file, tmp_path / "thumbnail.webp", edge=64)
    with Image.open(tmp_path / "thumbnail.webp") as small:
        assert small.convert("RGBA").getpixel((0, 0))[3] == 0


def test_a_print_jpeg_becomes_rgb(file: Path, tmp_path: Path) -> None:
    file.write_bytes(picture("JPEG", mode="CMYK"))
    images.thumbnail(file, tmp_path / "thumbnail.webp")
    with Image.open(tmp_path / "thumbnail.webp") as small:
        assert small.mode == "RGB"


def test_a_small_image_is_not_blown_up(file: Path, tmp_path: Path) -> None:
    file.write_bytes(picture())
    images.thumbnail(file, tmp_path / "thumbnail.webp")
    with Image.open(tmp_path / "thumbnail.webp") as small:
        assert small.size == (60, 40)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_its_thumbnail(file: Path, tmp_path: Path, kind: str) -> None:
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    red.save(file, kind, save_all=True, append_images=[blue], duration=100)
    images.thumbnail(file, tmp_path / "thumbnail.webp")
    with Image.open(tmp_path / "thumbnail.webp") as small:
        assert getattr(small, "n_frames", 1) == 1
        r, _, b = small.convert("RGB").getpixel((32, 32))
        assert r > 200
        assert b < 50


def test_a_thumbnail_of_a_damaged_image_is_an_error_of_ours(file: Path, tmp_path: Path) -> None:
    file.write_bytes(picture()[:2000])
    with pytest.raises(Retryable):
        images.thumbnail(file, tmp_path / "thumbnail.webp")


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS.values()])
def test_a_grid_is_cut_into_four_of_the_same_size(file: Path, tmp_path: Path, kind: str) -> None:
    file.write_bytes(picture(kind, (61, 41)))
    quarters = images.quarters(file, tmp_path)
    assert [images.inspect(quarter, **LIMITS).content_type for quarter in quarters] == ["image/png"] * 4
    assert {(info.width, info.height) for info in (images.inspect(quarter, **LIMITS) for quarter in quarters)} == {
        (30, 20)
    }


def test_what_is_too_small_for_a_grid_is_an_error_of_ours(file: Path, tmp_path: Path) -> None:
    file.write_bytes(picture(size=(1, 40)))
    with pytest.raises(Retryable) as caught:
        images.quarters(file, tmp_path)
    assert caught.value.code == "invalid_image"
