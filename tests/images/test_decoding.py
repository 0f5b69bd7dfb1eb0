"""Images as they come from outside: real ones of every kind, and whatever else a provider may send."""

import hashlib
import io
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms, ImageOps, ImageStat

from daemon.images import MOST_PIXELS, ImageInfo
from daemon.images.decoding import work
from daemon.images.jobs import Crashed, Decoded, DiskError, Job, NoImage, TooLarge
from daemon.providers import PROVIDERS, models
from tests.fakes.midjourney_api import COLOURS, grid
from tests.support.pictures import KINDS, chunk, jpeg_of_scans, noise, png, png_of_black

EVERY_KIND = [kind for kind, _ in KINDS.values()]


def decode(
    file: Path, *, max_bytes: int = 10_000_000, max_pixels: int = MOST_PIXELS, **wanted: Path
) -> Decoded | NoImage | TooLarge | DiskError:
    """Decode a file in this process."""
    result = work(Job(str(file), max_bytes, max_pixels, 5, **{name: str(path) for name, path in wanted.items()}))
    assert not isinstance(result, Crashed)
    return result


def shown(file: Path, **wanted: Any) -> ImageInfo:
    """Decode an image that has no flaw."""
    result = decode(file, **wanted)
    assert isinstance(result, Decoded), result
    assert result.flaw is None
    return result.info


def small_of(file: Path) -> Image.Image:
    """Return the thumbnail of an image."""
    out = file.with_suffix(".webp")
    shown(file, thumbnail=out)
    with Image.open(out) as small:
        small.load()
        return small


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "download"


@pytest.mark.parametrize(("content_type", "kind", "extension"), [(t, *k) for t, k in KINDS.items()])
def test_an_image_is_known_by_its_bytes(file: Path, content_type: str, kind: str, extension: str) -> None:
    data = noise(kind)
    file.write_bytes(data)
    assert shown(file) == ImageInfo(content_type, extension, 60, 40, len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("part", [0.3, 0.5, 0.9])
def test_a_truncated_image_is_refused(file: Path, kind: str, part: float) -> None:
    data = noise(kind)
    file.write_bytes(data[: int(len(data) * part)])
    assert isinstance(decode(file), NoImage)


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
        b"GIF89a/*<html><script>alert(1)</script>*/",
        b"\x00\x00\x00\x1cftypavif",
        b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(40),
    ],
)
def test_file_that_is_no_image_is_refused(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    result = decode(file)
    assert isinstance(result, NoImage)
    assert result.message.endswith(".")


def test_a_file_over_the_limit_is_too_large(file: Path) -> None:
    file.write_bytes(noise())
    result = decode(file, max_bytes=100)
    assert isinstance(result, TooLarge)
    assert "the limit is" in result.message


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (20_000, 20_000), (20_001, 1_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(file: Path, size: tuple[int, int]) -> None:
    file.write_bytes(png(size, pixels=zlib.compress(bytes(1000))))
    result = decode(file)
    assert isinstance(result, TooLarge)
    assert result.data == {"width": size[0], "height": size[1]}


def test_our_limit_counts_and_not_that_of_pillow(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    file.write_bytes(noise())
    assert shown(file).width == 60


def test_the_catalogue_makes_nothing_that_is_not_decoded() -> None:
    edges = {"1K": 1024, "2K": 2048, "4K": 4096}
    for provider in PROVIDERS:
        for model in models(provider):
            for size in model.sizes:
                width, _, height = size.partition("x")
                pixels = int(width) * int(height) if height else edges[size] ** 2
                assert 1.1 * pixels < MOST_PIXELS  # Google's edges are rounded to the ratio


def test_a_jpeg_of_many_scans_is_refused_at_once(file: Path) -> None:
    file.write_bytes(jpeg_of_scans(10_000))
    started = time.process_time()
    result = decode(file)
    assert time.process_time() - started < 0.3
    assert isinstance(result, NoImage)
    assert "scans" in result.message


@pytest.mark.parametrize("progressive", [True, False])
def test_usual_numbers_of_scans_are_fine(file: Path, *, progressive: bool) -> None:
    file.write_bytes(noise("JPEG", progressive=progressive))
    shown(file)
    file.write_bytes(jpeg_of_scans(80, (64, 64)))
    shown(file)


WORKFLOW = b"workflow\0\0" + zlib.compress(b'{"nodes": []}' * 120_000)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
BESIDE: dict[str, bytes] = {
    "1.5 MB of workflow": chunk(b"zTXt", WORKFLOW),
    "3 MB of text": chunk(b"tEXt", b"prompt\0" + b"a red fox " * 300_000),
    "text in many chunks": chunk(b"tEXt", b"prompt\0" + b"fox " * 20_000) * 40,
    "a text that is not compressed": chunk(b"zTXt", b"workflow\0\0nothing packed"),
    "a text with a wrong checksum": chunk(b"tEXt", b"prompt\0fox")[:-4] + b"abcd",
    "a profile of 2 MB": chunk(b"iCCP", b"icc\0\0" + zlib.compress(PROFILE + bytes(2_000_000))),
    "a profile that is none": chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"nothing")),
    "a profile that is not compressed": chunk(b"iCCP", b"icc\0\0nothing"),
    "EXIF that is none": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "transparency of a wrong length": chunk(b"tRNS", b"\0"),
    "a density of a wrong length": chunk(b"pHYs", b"\0"),
    "a gamma of a wrong length": chunk(b"gAMA", b""),
    "an animation without frames": chunk(b"acTL", b"\0"),
    "a chunk nobody knows": chunk(b"abCd", bytes(10)),
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE.keys())
def test_data_beside_the_pixels_decides_nothing(file: Path, beside: bytes) -> None:
    file.write_bytes(png(before=beside))
    assert small_of(file).size == (60, 40)


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE])
@pytest.mark.parametrize("data", [b"", b"Exif\0\0MM", b"JFIF\0", b"ICC_PROFILE\0\1\2", b"Adobe", b"Photoshop 3.0\0x"])
def test_segments_beside_the_pixels_decide_nothing(file: Path, marker: int, data: bytes) -> None:
    good = noise("JPEG")
    file.write_bytes(good[:2] + struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data + good[2:])
    assert small_of(file).size == (60, 40)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_bytes_behind_the_image_decide_nothing(file: Path, kind: str) -> None:
    file.write_bytes(noise(kind) + b"something else" * 100)
    shown(file)


PIXELS = zlib.compress(b"".join(b"\0" + bytes([number]) * 180 for number in range(40)))
WHOLE: dict[str, bytes] = {
    "a PNG without its end": png()[:-12],
    "a PNG without its last checksum": png()[:-16],
    "a PNG whose pixels have a wrong checksum": png(pixels=PIXELS[:-4] + b"abcd"),
    "a PNG whose pixels have none": png(pixels=PIXELS[:-4]),
    "a PNG with more pixels than it says": png((60, 30), pixels=PIXELS),
    "a JPEG without its end": noise("JPEG")[:-2],
    "a GIF without its end": noise("GIF")[:-1],
}


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE.keys())
def test_an_image_with_all_its_pixels_is_whole(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    assert small_of(file).width == 60


@pytest.mark.parametrize("colour", ["black", "gray", "white"])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_plain_picture_is_whole(file: Path, kind: str, colour: str) -> None:
    Image.new("RGB", (640, 640), colour).save(file, kind)
    assert small_of(file).size == (512, 512)


def half_of_a_png(*, interlaced: bool = False) -> bytes:
    whole = png(pixels=zlib.compress(zlib.decompress(PIXELS)[: 181 * 20]))
    if not interlaced:
        return whole
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60, 40, 8, 2, 0, 0, 1))
    return whole[:8] + header + whole[8 + 25 :]


HALVES: dict[str, bytes] = {
    "a PNG": half_of_a_png(),
    "an interlaced PNG": half_of_a_png(interlaced=True),
    **{
        f"a JPEG {name}": noise("JPEG", (256, 256), **options)[:-20_000] + b"\xff\xd9"
        for name, options in {
            "": {},
            "with markers to restart": {"restart_marker_rows": 1},
            "in grey": {"mode": "L", "quality": 95},
            "for print": {"mode": "CMYK"},
            "without subsampling": {"subsampling": 0},
        }.items()
    },
}


@pytest.mark.parametrize("data", HALVES.values(), ids=HALVES.keys())
def test_half_a_picture_is_not_whole(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    assert isinstance(decode(file), NoImage)


def test_rotated_image_is_measured_and_thumbnailed_upright(file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file.write_bytes(noise("JPEG", size=(2000, 1000), exif=exif))
    info = shown(file)
    assert (info.width, info.height) == (1000, 2000)
    small = small_of(file)
    assert small.size == (256, 512)
    assert not small.getexif()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_thumbnail_is_upright_whichever_way_the_image_lies(file: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = Image.new("RGB", (64, 32), "blue")
    seen.paste("red", (0, 0, 16, 16))
    seen.save(file, "PNG", exif=exif)
    with Image.open(file) as lying:
        upright = ImageOps.exif_transpose(lying)
    small = small_of(file)
    assert small.size == upright.size
    difference = ImageChops.difference(small.convert("RGB"), upright.convert("RGB"))
    assert max(ImageStat.Stat(difference).mean) < 10


def test_unwritable_exif_stops_no_thumbnail(file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    good = noise("JPEG", exif=exif)
    entry = good.index(b"\x01\x0e\x00\x02")
    # A text whose type says that it is a fraction.
    file.write_bytes(good[:entry] + b"\x01\x0e\x00\x05\x00\x00\x00\x01" + good[entry + 8 :])
    assert small_of(file).size == (40, 60)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(EVERY_KIND),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 40)), min_size=1, max_size=4),
)
def test_damaged_files_have_a_result(file: Path, kind: str, edits: list[tuple[float, bytes, int]]) -> None:
    """Of images of every kind with bytes put in, taken out and replaced at up to four places: every file has one of the
    results, and where it is an image, its thumbnail can be read or its flaw says why not."""
    data = noise(kind, (48, 32))
    for place, put, taken in edits:
        at = int(place * len(data))
        data = data[:at] + put + data[at + taken :]
    file.write_bytes(data)
    small = file.with_suffix(".webp")
    small.unlink(missing_ok=True)
    result = decode(file, thumbnail=small)
    if isinstance(result, Decoded) and result.flaw is None:
        with Image.open(small) as thumbnail:
            assert max(thumbnail.size) <= 512


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    beside=st.lists(
        st.tuples(
            st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"cHRM", b"pHYs", b"tIME", b"tRNS"]),
            st.binary(max_size=60),
        ),
        max_size=4,
    ),
    segments=st.lists(st.tuples(st.integers(0xE0, 0xEF), st.binary(max_size=60)), max_size=4),
)
def test_whole_pixels_are_an_image(
    file: Path, beside: list[tuple[bytes, bytes]], segments: list[tuple[int, bytes]]
) -> None:
    """Of PNGs and JPEGs with up to four chunks or segments of any bytes before their pixels: each is an image."""
    file.write_bytes(png((48, 32), before=b"".join(chunk(name, data) for name, data in beside)))
    small_of(file)
    good = noise("JPEG", (48, 32))
    put = b"".join(struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data for marker, data in segments)
    file.write_bytes(good[:20] + put + good[20:])
    small_of(file)


def test_trouble_with_the_disk_is_not_the_image_s_fault(file: Path, tmp_path: Path) -> None:
    assert isinstance(decode(tmp_path / "gone"), DiskError)
    file.write_bytes(noise())
    result = decode(file, thumbnail=tmp_path)
    assert isinstance(result, Decoded)
    assert result.flaw is not None
    assert "disk" in result.flaw


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
@pytest.mark.parametrize("size", [(1024, 512), (4100, 2050)])
def test_every_colour_mode_gets_a_thumbnail(file: Path, mode: str, size: tuple[int, int]) -> None:
    picture = Image.new("L", size, 90)
    picture.paste(200, (0, 0, size[0] // 2, size[1]))
    picture.convert(mode).save(file, "PNG", compress_level=1)
    assert small_of(file).size == (512, 256)


@pytest.mark.parametrize("size", [(600, 600), (2100, 2100)])
def test_a_transparent_image_stays_transparent(file: Path, size: tuple[int, int]) -> None:
    picture = Image.new("RGBA", size, (255, 0, 0, 0))
    picture.paste((0, 255, 0, 255), (0, 0, size[0] // 2, size[1]))
    picture.save(file, "PNG")
    small = small_of(file).convert("RGBA")
    assert small.getpixel((500, 256))[3] == 0
    assert small.getpixel((100, 256))[3] == 255
    assert small.getpixel((100, 256))[1] > 240


def test_16_bit_grey_stays_grey(file: Path) -> None:
    ramp = Image.frombytes("I;16", (256, 64), struct.pack("<256H", *range(0, 65536, 256)) * 64)
    ramp.save(file, "PNG")
    small = small_of(file).convert("L")
    assert [abs(small.getpixel((x, 32)) - x) < 6 for x in (20, 128, 250)] == [True] * 3


def test_a_print_jpeg_becomes_rgb(file: Path) -> None:
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(file, "JPEG", quality=95)
    small = small_of(file)
    assert small.mode == "RGB"
    red, green, blue = small.getpixel((32, 32))
    assert (red > 240, green < 20, blue < 20) == (True, True, True)


@pytest.mark.parametrize(
    ("kind", "transparent"),
    [("JPEG", False), *((kind, transparent) for kind in ("PNG", "WEBP", "AVIF") for transparent in (False, True))],
)
def test_a_thumbnail_has_the_colours_that_the_profile_means(file: Path, kind: str, *, transparent: bool) -> None:
    colour = (100, 150, 200, 128 if transparent else 255)
    picture = Image.new("RGBA", (64, 64), colour).convert("RGBA" if transparent else "RGB")
    profile = swapped_primaries()
    picture.save(file, kind, icc_profile=profile, quality=95)
    small = small_of(file)
    expected = ImageCms.profileToProfile(
        picture.convert("RGB"), ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    )
    meant = expected.getpixel((32, 32))
    assert max(abs(a - b) for a, b in zip(meant, colour, strict=False)) > 30
    assert max(abs(a - b) for a, b in zip(small.getpixel((32, 32)), meant, strict=False)) < 8
    assert "icc_profile" not in small.info
    assert small.mode == ("RGBA" if transparent else "RGB")


def swapped_primaries() -> bytes:
    """A profile that means red where sRGB means green, and green where it means red."""
    profile = bytearray(PROFILE)
    count = int.from_bytes(profile[128:132], "big")
    tags = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile)


def test_a_small_image_is_not_blown_up(file: Path) -> None:
    file.write_bytes(noise())
    assert small_of(file).size == (60, 40)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_its_thumbnail(file: Path, kind: str) -> None:
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    red.save(file, kind, save_all=True, append_images=[blue], duration=100)
    small = small_of(file)
    assert getattr(small, "n_frames", 1) == 1
    r, _, b = small.convert("RGB").getpixel((32, 32))
    assert r > 200
    assert b < 50


def test_an_image_larger_than_the_catalogue_s_is_an_image(file: Path) -> None:
    file.write_bytes(png_of_black((6000, 5000)))
    result = decode(file, max_pixels=100_000_000, thumbnail=file.with_suffix(".webp"))
    assert isinstance(result, Decoded)
    assert (result.info.width, result.info.height) == (6000, 5000)
    assert result.flaw is not None
    assert "6000x5000" in result.flaw


def test_a_grid_is_cut_into_its_pictures(file: Path, tmp_path: Path) -> None:
    file.write_bytes(grid())
    result = decode(file, quarters=tmp_path)
    assert isinstance(result, Decoded)
    for quarter, colour in zip(result.quarters, COLOURS, strict=True):
        with Image.open(quarter.path) as picture:
            assert picture.size == (quarter.info.width, quarter.info.height)
            assert picture.convert("RGB").getcolors() == [(64 * 48, Image.new("RGB", (1, 1), colour).getpixel((0, 0)))]
        data = Path(quarter.path).read_bytes()
        assert (quarter.info.bytes, quarter.info.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_grid_of_every_kind_is_cut(file: Path, tmp_path: Path, kind: str) -> None:
    file.write_bytes(noise(kind, (61, 41)))
    result = decode(file, quarters=tmp_path)
    assert isinstance(result, Decoded)
    assert {(quarter.info.width, quarter.info.height) for quarter in result.quarters} == {(30, 20)}
    assert len(result.quarters) == 4


def test_image_too_small_for_a_grid_is_refused(file: Path, tmp_path: Path) -> None:
    file.write_bytes(noise(size=(1, 40)))
    assert isinstance(decode(file, quarters=tmp_path), NoImage)
