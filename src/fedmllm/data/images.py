"""Decodes images lazily, with size limits and errors that name the file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFilter, UnidentifiedImageError

from fedmllm.errors import DataError
from fedmllm.files import is_pointer
from fedmllm.types import EditedImage, Picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Supported formats. Others are rejected, because some, such as EPS, pass the file to another program."""

MAX_PIXELS = 64_000_000
"""Larger images are rejected before they are decoded, because a small file can claim to be a huge image."""


_BROKEN = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
)
"""The errors that Pillow raises for damaged files."""


def open_image(source: str | Picture) -> Image.Image:
    """Return an image in RGB, upright according to its EXIF orientation (if that is readable), with its edits applied.

    Args:
        source: a file, the bytes of a file, an image in memory, or an image with pending edits.

    Raises:
        DataError: if the file is missing, is not an image, is truncated, has no pixels, or claims more than ``MAX_PIXELS`` pixels.
    """
    if isinstance(source, EditedImage):
        image = open_image(source.source)
        for edit in source.edits:
            image = EDITS[edit.name](image, edit.strength, np.random.default_rng(edit.seed))
        return image
    if isinstance(source, Image.Image):
        if not all(source.size):
            raise DataError(f"an image of {source.width}x{source.height} pixels is empty; remove it")
        return source if source.mode == "RGB" and "transparency" not in source.info else _to_rgb(source)
    name = _named(source)
    try:
        with Image.open(_readable(source), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{name}: has {image.width}x{image.height} pixels, but at most {MAX_PIXELS:,} are allowed; shrink the image"
                )
            return _to_rgb(_upright(image))
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such image; check the folder's path") from error
    except _BROKEN as error:
        if not isinstance(source, bytes) and is_pointer(Path(source)):
            raise DataError(f"{name}: is a git-lfs pointer instead of an image; download the file, e.g. with 'git lfs pull'") from error
        raise DataError(f"{name}: cannot be decoded as an image ({error}); replace or remove it") from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image upright, by EXIF orientation."""


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned by its EXIF orientation, or unchanged if there is none or the EXIF block is damaged."""
    turn = _TURNS.get(_orientation(image) or 1)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation: 1 if the file has none, None if its EXIF block is damaged, which makes Pillow raise arbitrary errors."""
    try:
        exif = image.getexif()
        exif.tobytes()
        return int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None


def _blur(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Apply Gaussian blur with a radius of ``strength`` percent of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(strength / 100 * min(image.size)))


def _noise(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Add Gaussian noise with a standard deviation of ``strength`` gray levels of 255, independently for each pixel and channel."""
    values = np.asarray(image, dtype=np.float64)
    return Image.fromarray(np.clip(values + rng.normal(0, strength, values.shape), 0, 255).round().astype(np.uint8))


def _occlusion(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Hide ``strength`` of the image's area behind a gray box with the image's proportions at a random position."""
    width, height = (round(side * strength**0.5) for side in image.size)
    left, top = (int(rng.integers(whole - part + 1)) for whole, part in zip(image.size, (width, height), strict=True))
    hidden = image.copy()
    hidden.paste((128, 128, 128), (left, top, left + width, top + height))
    return hidden


def _low_resolution(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Shrink the image's sides by the factor ``strength`` and enlarge it again."""
    small = image.resize((max(1, round(image.width / strength)), max(1, round(image.height / strength))), Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.BILINEAR)


EDITS: Mapping[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "blur": _blur,
    "noise": _noise,
    "occlusion": _occlusion,
    "low_resolution": _low_resolution,
}
"""Edits by name. ``data.quality`` defines the bounds of their strengths."""


def check_images(sources: Iterable[Path | bytes]) -> tuple[dict[Path | bytes, str], list[str]]:
    """Check images before a run starts, so that a broken one does not stop it halfway.

    Returns:
        for each image that cannot be decoded, the reason; and notes on images that may not be upright.
    """
    pictures = list(dict.fromkeys(sources))
    with ThreadPoolExecutor() as pool:
        found = dict(zip(pictures, pool.map(_checked, pictures), strict=True))
    broken = {picture: problem for picture, (problem, _) in found.items() if problem}
    return broken, [note for _, note in found.values() if note]


def _checked(source: Path | bytes) -> tuple[str, str]:
    """Return (what is wrong with an image, a note on it). Each is empty if there is nothing to report."""
    try:
        open_image(source)
    except DataError as error:
        return str(error), ""
    with Image.open(_readable(source), formats=FORMATS) as image:
        return "", "" if _orientation(image) else f"{_named(source)}: its EXIF block is damaged, so the image may not be upright"


def _readable(source: str | Path | bytes) -> str | Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _named(source: str | Path | bytes) -> str:
    return f"{len(source):,} bytes" if isinstance(source, bytes) else str(source)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB. Transparent pixels become white; gray values of more than 8 bits are rescaled from their finite minimum and maximum.

    Pillow's plain conversion would make transparent pixels black and clip gray values at 255.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
        low, span = finite.min(), float(np.ptp(finite)) or 1.0
        known = np.nan_to_num(values, nan=low, posinf=finite.max(), neginf=low)
        return Image.fromarray(((known - low) / span * 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        page = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(page, rgba).convert("RGB")
    return image.convert("RGB")
