"""Decoding images: lazily, with limits, and with errors that name the file."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fedmllm.errors import DataError, listing

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


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """The picture as RGB, turned upright by its EXIF orientation.

    Args:
        source: a file, or a picture already in memory.

    Raises:
        DataError: if the file is missing, is no picture, is cut short, or claims more than ``MAX_PIXELS`` pixels.
    """
    if isinstance(source, Image.Image):
        return source if source.mode == "RGB" and "transparency" not in source.info else _to_rgb(source)
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{source}: {image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are decoded; shrink the picture")
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise DataError(f"{source}: no such image; check the folder's path") from error
    except _BROKEN as error:
        raise DataError(f"{source}: cannot be decoded as an image ({error}); replace or remove it") from error


def check_images(sources: Iterable[Path]) -> None:
    """Decode every picture once, so that a broken one is found before a run begins and not in the middle of it.

    Raises:
        DataError: listing all pictures that cannot be decoded.
    """
    paths = sorted(set(sources))
    with ThreadPoolExecutor() as pool:
        problems = [problem for problem in pool.map(_problem, paths) if problem]
    if problems:
        raise DataError(f"{len(problems)} of {len(paths)} images cannot be used:\n{listing(problems)}")


def _problem(path: Path) -> str | None:
    try:
        open_image(path)
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
