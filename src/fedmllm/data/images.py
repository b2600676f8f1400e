"""Decoding images: lazily, with limits, and with errors that name the file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from fedmllm.errors import DataError
from fedmllm.types import EditedImage, Picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is decoded. Others are refused: some, such as EPS, hand the file to another program."""

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: a small file can claim to be an enormous picture."""


_BROKEN = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
)
"""What Pillow raises for files that are damaged one way or another."""


def open_image(source: str | Picture) -> Image.Image:
    """The picture as RGB, turned upright by its EXIF orientation, with its edits made.

    Args:
        source: a file, its bytes, a picture already in memory, or one with edits to be made.

    Raises:
        DataError: if the file is missing, is no picture, is cut short, has no pixels, or claims more than ``MAX_PIXELS`` pixels.
    """
    if isinstance(source, EditedImage):
        image = open_image(source.source)
        for edit in source.edits:
            image = EDITS[edit.name](image, edit.strength, np.random.default_rng(edit.seed))
        return image
    if isinstance(source, Image.Image):
        if not all(source.size):
            raise DataError(f"a picture of {source.width}x{source.height} pixels shows nothing; remove it")
        return source if source.mode == "RGB" and "transparency" not in source.info else _to_rgb(source)
    name = f"{len(source):,} bytes" if isinstance(source, bytes) else source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name}: {image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are decoded; shrink the picture")
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such image; check the folder's path") from error
    except _BROKEN as error:
        raise DataError(f"{name}: cannot be decoded as an image ({error}); replace or remove it") from error


def _blur(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian, with a radius of ``strength`` percent of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(strength / 100 * min(image.size)))


def _noise(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian, with a standard deviation of ``strength`` gray levels of 255, independent by pixel and channel."""
    values = np.asarray(image, dtype=np.float64)
    return Image.fromarray(np.clip(values + rng.normal(0, strength, values.shape), 0, 255).round().astype(np.uint8))


def _occlusion(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """A gray box of the picture's proportions hides ``strength`` of its area, somewhere inside."""
    width, height = (round(side * strength**0.5) for side in image.size)
    left, top = (int(rng.integers(whole - part + 1)) for whole, part in zip(image.size, (width, height), strict=True))
    hidden = image.copy()
    hidden.paste((128, 128, 128), (left, top, left + width, top + height))
    return hidden


def _low_resolution(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Shrunk to 1 / ``strength`` of its sides and enlarged again."""
    small = image.resize((max(1, round(image.width / strength)), max(1, round(image.height / strength))), Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.BILINEAR)


EDITS: Mapping[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "blur": _blur,
    "noise": _noise,
    "occlusion": _occlusion,
    "low_resolution": _low_resolution,
}
"""What can be done to a picture by name; strengths as ``data.quality`` bounds them."""


def broken_images(sources: Iterable[Path | bytes]) -> dict[Path | bytes, str]:
    """The pictures that cannot be decoded and why; asked before a run begins, so that it does not end in the middle."""
    pictures = list(dict.fromkeys(sources))
    with ThreadPoolExecutor() as pool:
        return {picture: problem for picture, problem in zip(pictures, pool.map(_problem, pictures), strict=True) if problem}


def _problem(source: Path | bytes) -> str | None:
    try:
        open_image(source)
    except DataError as error:
        return str(error)
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Transparent pixels become white, as on paper; gray of more than 8 bits is stretched from its least to its largest value.

    The library's bare conversion would turn the former black and cut the latter off at 255.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        span = max(float(np.ptp(values)), 1.0)
        return Image.fromarray(((values - values.min()) * (255 / span)).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        page = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(page, rgba).convert("RGB")
    return image.convert("RGB")
