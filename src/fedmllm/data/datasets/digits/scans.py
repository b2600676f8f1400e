"""Images for the embedded datasets: real handwritten digits, composed on a small sheet.

The 1,797 scans of 8x8 pixels ship with scikit-learn (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
Digits, UCI, 1998, CC BY 4.0). They come from 13 writers in writing order, about 138 scans each, so contiguous blocks
hold (almost) disjoint writers: no scan is in two splits, and the test sheets show hands that neither pretraining nor
training has seen. Validation sheets show the hands that pretraining has seen and training has not.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Split = Literal["pretrain", "train", "validation", "test"]

SHEET = 64
"""Side of a sheet in pixels."""

INKS = {"black": (25, 25, 25), "red": (200, 30, 30), "blue": (30, 50, 200), "green": (20, 130, 40)}

_BLOCKS: dict[Split, tuple[int, int]] = {"pretrain": (0, 1000), "train": (1000, 1400), "validation": (0, 1000), "test": (1400, 1797)}


@cache
def scans_by_digit(split: Split) -> tuple[NDArray[np.uint8], ...]:
    """Return a split's scans: for each digit 0-9 an array of shape (scans, 8, 8) with values from 0 (paper) to 255 (ink)."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    block = slice(*_BLOCKS[split])
    images = np.round(pixels[block].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return tuple(images[digits[block] == digit] for digit in range(10))


def sheet(digits: tuple[int, ...], ink: str, split: Split, rng: np.random.Generator) -> Image.Image:
    """Draw a sheet of 64x64 RGB pixels with the digits from left to right in one ink.

    Args:
        digits: one or two digits; a single digit is near the middle.
        ink: a key of ``INKS``.
        split: the split whose writers' scans are used.
        rng: draws scan, size, slant and position of each digit, and the tint of the paper.
    """
    paper = tuple(int(v) for v in rng.integers(225, 256, size=3))
    page = Image.new("RGB", (SHEET, SHEET), paper)
    width = SHEET // len(digits)
    for place, digit in enumerate(digits):
        _write(page, digit, ink, split, rng, center=(width * place + width // 2, SHEET // 2))
    return page


def _write(page: Image.Image, digit: int, ink: str, split: Split, rng: np.random.Generator, center: tuple[int, int]) -> None:
    """Paste one scan on the page, enlarged to 26-32 pixels, slanted by up to 8 degrees and moved by a few pixels."""
    scans = scans_by_digit(split)[digit]
    scan = Image.fromarray(scans[rng.integers(len(scans))])
    side = int(rng.integers(26, 33))
    mask = scan.resize((side, side), Image.Resampling.BICUBIC)
    mask = mask.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BICUBIC)
    mask = ImageOps.autocontrast(mask, cutoff=1)
    x = center[0] - side // 2 + int(rng.integers(-2, 3))
    y = center[1] - side // 2 + int(rng.integers(-4, 5))
    page.paste(Image.new("RGB", mask.size, INKS[ink]), (x, y), mask)
