"""Decoding pictures: the decoded pixels, and a DataError as the only error."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from fedmllm.data import images
from fedmllm.data.images import open_image
from fedmllm.errors import DataError

Pixels = NDArray[np.uint8]
WHITE, RED = (255, 255, 255), (200, 0, 0)


def pixels(image: Image.Image) -> Pixels:
    assert image.mode == "RGB"
    return np.asarray(image)


def noise(height: int = 5, width: int = 7, channels: int = 3) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, size=(height, width, channels), dtype=np.uint8)


def test_rgb_pixels_are_read_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise()).save(path)

    for source in (path, str(path)):
        assert (pixels(open_image(source)) == noise()).all()


def test_jpeg_pixels_are_read_nearly_unchanged(tmp_path: Path) -> None:
    flat = np.full((16, 16, 3), (200, 120, 40), dtype=np.uint8)
    Image.fromarray(flat).save(tmp_path / "a.jpg", quality=95)

    assert np.abs(pixels(open_image(tmp_path / "a.jpg")).astype(int) - flat).max() <= 3


def test_a_picture_in_memory_is_kept_or_converted() -> None:
    rgb = Image.fromarray(noise())
    gray = Image.fromarray(noise()[:, :, 0])

    assert open_image(rgb) is rgb
    assert (pixels(open_image(gray)) == noise()[:, :, :1]).all()


def test_the_file_is_closed(tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "a.png")

    image = open_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()

    assert (pixels(image) == noise()).all()


# Transparency is white.


def saved(image: Image.Image, **options: Any) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def red_and_clear(mode: str) -> Image.Image:
    """Two pixels: an opaque one, red or gray, and a fully transparent one that is black underneath."""
    if mode == "RGBA":
        return Image.fromarray(np.array([[(*RED, 255), (0, 0, 0, 0)]], dtype=np.uint8))
    if mode == "LA":
        return Image.fromarray(np.array([[(90, 255), (0, 0)]], dtype=np.uint8))
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    return palette


TRANSPARENT = {
    "RGBA": (saved(red_and_clear("RGBA")), RED),
    "LA": (saved(red_and_clear("LA")), (90, 90, 90)),
    "P, one transparent color": (saved(red_and_clear("P"), transparency=1), RED),
    "P, a table of opacities": (saved(red_and_clear("P"), transparency=bytes([255, 0])), RED),
    "RGB, one transparent color": (saved(red_and_clear("P").convert("RGB"), transparency=(0, 0, 0)), RED),
    "L, one transparent gray": (saved(red_and_clear("LA").convert("L"), transparency=0), (90, 90, 90)),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_become_white(kind: str, tmp_path: Path) -> None:
    content, opaque = TRANSPARENT[kind]
    (tmp_path / "a.png").write_bytes(content)

    assert pixels(open_image(tmp_path / "a.png")).tolist() == [[list(opaque), list(WHITE)]]


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_in_memory_become_white(kind: str) -> None:
    content, opaque = TRANSPARENT[kind]

    assert pixels(open_image(Image.open(io.BytesIO(content)))).tolist() == [[list(opaque), list(WHITE)]]


def test_opaque_black_stays_black(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 255)).save(tmp_path / "a.png")
    Image.new("P", (2, 2), 0).save(tmp_path / "b.png")

    assert pixels(open_image(tmp_path / "a.png")).max() == pixels(open_image(tmp_path / "b.png")).max() == 0


@given(color=st.tuples(*[st.integers(0, 255)] * 4))
@settings(max_examples=50)
def test_half_transparent_pixels_are_mixed_with_white(color: tuple[int, int, int, int]) -> None:
    opacity = color[3] / 255
    expected = [opacity * channel + (1 - opacity) * 255 for channel in color[:3]]

    assert np.abs(pixels(open_image(Image.new("RGBA", (1, 1), color)))[0, 0] - np.array(expected)).max() <= 1


# EXIF orientation, by the tag's definition: where row 0 and column 0 of the stored picture are in the upright one.

UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("channels", [3, 4], ids=["RGB", "RGBA"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_rotated_by_their_exif_orientation(orientation: int, channels: int, tmp_path: Path) -> None:
    stored = noise(channels=channels)
    stored[:, :, 3:] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)

    assert (pixels(open_image(tmp_path / "a.png")) == UPRIGHT[orientation](stored)[:, :, :3]).all()


# What cannot be decoded.


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(24, 31)).save(buffer, form, **({"exif": exif} if form in {"PNG", "JPEG", "WEBP"} else {}))
    return buffer.getvalue()


FORMATS = {form: encoded(form) for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP")}


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds almost nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "name", ["gone.png", "folder/gone.png", "x" * 5000, "null\0byte", ""], ids=["file", "folder", "long", "null", "empty"]
)
def test_a_missing_picture_is_named(name: str, tmp_path: Path) -> None:
    source = f"{tmp_path}/{name}"

    with pytest.raises(DataError) as error:
        open_image(source)
    assert str(error.value).startswith(f"{source}: ")


def test_missing_and_damaged_pictures_have_different_messages(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"text, say")

    with pytest.raises(DataError, match="no such image"):
        open_image(tmp_path / "b.png")
    with pytest.raises(DataError, match="cannot be decoded"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"a sentence", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"<svg></svg>"])
def test_files_that_are_not_pictures_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)

    with pytest.raises(DataError, match=r"a\.png: cannot be decoded as an image"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("form", FORMATS)
def test_a_truncated_picture_is_refused(form: str, share: float, tmp_path: Path) -> None:
    content = FORMATS[form]
    (tmp_path / "a").write_bytes(content[: int(share * len(content))])

    with pytest.raises(DataError, match="cannot be decoded as an image"):
        open_image(tmp_path / "a")
    (tmp_path / "a").write_bytes(content)
    assert open_image(tmp_path / "a").mode == "RGB"


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(8001, 8000))

    with pytest.raises(DataError, match="8001x8000 pixels, but at most 64,000,000 are allowed"):
        open_image(tmp_path / "a.png")


def test_pixels_up_to_the_limit_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 12)
    for width, height in ((4, 3), (13, 1)):
        Image.new("RGB", (width, height)).save(tmp_path / f"{width}.png")

    assert open_image(tmp_path / "4.png").size == (4, 3)
    with pytest.raises(DataError, match="13x1 pixels, but at most 12"):
        open_image(tmp_path / "13.png")


@pytest.mark.parametrize("side", [20_000, 2**31 - 1])
def test_sizes_that_pillow_itself_refuses_are_refused(side: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(side, side))

    with pytest.raises(DataError, match=r"a\.png: .* pixels"):
        open_image(tmp_path / "a.png")


def test_sizes_that_pillow_warns_of_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(10_000, 10_000))

    with pytest.raises(DataError, match=r"10000x10000 pixels|100000000 pixels"):
        open_image(tmp_path / "a.png")


def test_variants_unknown_to_pillow_are_refused(tmp_path: Path) -> None:
    texture = bytearray(b"DDS " + bytes(124))
    struct.pack_into("<7I", texture, 4, 124, 0x1007, 4, 4, 16, 0, 0)
    struct.pack_into("<2I", texture, 76, 32, 0)  # a pixel format of no known kind
    (tmp_path / "a.png").write_bytes(texture)

    with pytest.raises(DataError, match="cannot be decoded as an image"):
        open_image(tmp_path / "a.png")


def test_sixteen_bit_gray_keeps_its_shades(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / "a.png")

    assert np.abs(pixels(open_image(tmp_path / "a.png"))[:, :, 0] - ramp / 257.0).max() <= 1


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.05), (-3e30, 7e30), (1e-30, 2e-30)])
def test_floating_point_gray_is_scaled_to_all_shades(low: float, high: float, tmp_path: Path) -> None:
    """For any unit. Values that are not numbers become black, infinite ones black or white."""
    ramp = np.linspace(low, high, 16, dtype=np.float32).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    assert np.abs(pixels(open_image(tmp_path / "a.tiff"))[:, :, 0].ravel() - np.linspace(0, 255, 16)).max() <= 1
    ramp[0] = [np.nan, np.inf, -np.inf, low]
    assert pixels(open_image(Image.fromarray(ramp)))[0, :, 0].tolist() == [0, 255, 0, 0]


def damaged_exif() -> bytes:
    """A 60 x 30 JPEG whose EXIF block has orientation 6, a tag of a wrong type and a text beyond its end."""
    entries = ((0x0112, 3, 1, 6), (0x0111, 1, 1, 1), (0x0132, 2, 20, 5000))
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    buffer = io.BytesIO()
    Image.new("RGB", (60, 30), "red").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + buffer.getvalue()[2:]


def test_a_damaged_exif_block_does_not_prevent_decoding(tmp_path: Path) -> None:
    """The picture is used as it is, with a warning that it was not rotated."""
    (tmp_path / "a.jpg").write_bytes(damaged_exif())
    Image.new("RGB", (4, 4)).save(tmp_path / "b.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of the block
        assert open_image(tmp_path / "a.jpg").size == (60, 30)
        broken, notes = images.check_images([tmp_path / "a.jpg", tmp_path / "b.jpg"])
    assert broken == {}
    assert notes == [f"{tmp_path}/a.jpg: its EXIF block is damaged, so the image may not be upright"]


def test_a_git_lfs_pointer_has_its_own_message(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(DataError, match=r"a\.png: is a git-lfs pointer instead of an image"):
        open_image(tmp_path / "a.png")


# Fuzzing.


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that each example overwrites."""
    return tmp_path_factory.mktemp("fuzz") / "picture"


def decoded_or_refused(path: Path, content: bytes) -> Image.Image | None:
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata and continues
        try:
            image = open_image(path)
        except DataError:
            return None
    assert pixels(image).size > 0
    return image


@given(content=st.binary(max_size=300))
@settings(max_examples=100)
def test_random_bytes_are_refused(content: bytes, scratch: Path) -> None:
    assert decoded_or_refused(scratch, content) is None


@given(form=st.sampled_from(sorted(FORMATS)), tail=st.binary(max_size=300))
@settings(max_examples=100)
def test_random_bytes_after_a_valid_start_are_refused_or_decoded(form: str, tail: bytes, scratch: Path) -> None:
    decoded_or_refused(scratch, FORMATS[form][:40] + tail)


@given(
    form=st.sampled_from(sorted(FORMATS)), damage=st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=4)), min_size=1, max_size=5)
)
@settings(max_examples=200)
def test_damaged_pictures_are_refused_or_decoded(form: str, damage: list[tuple[int, bytes]], scratch: Path) -> None:
    content = FORMATS[form]
    for at, junk in damage:
        start = at % len(content)
        content = content[:start] + junk + content[start + max(1, len(junk)) :]
    decoded_or_refused(scratch, content)


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(DataError, match="an image of 0x5 pixels is empty"):
        open_image(Image.new("RGB", (0, 5)))
