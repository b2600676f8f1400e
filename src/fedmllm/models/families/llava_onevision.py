"""LLaVA-OneVision: pictures are brought to one of a list of resolutions, which are cut into tiles of one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fedmllm.models.families.generic import ModelFamily


class LlavaOneVision(ModelFamily):
    """``pixel_values`` has shape (pictures, tiles, channels, side, side); the model knows from a picture's size how many tiles it has."""

    def batch(self, extras: Sequence[Mapping[str, Tensor]], shifts: Sequence[int]) -> dict[str, Any]:
        """Empty tiles behind those of pictures that have fewer than others."""
        most = max((sample["pixel_values"].shape[1] for sample in extras if "pixel_values" in sample), default=0)
        return super().batch([_filled(sample, most) for sample in extras], shifts)

    def limit_slices(self, model: Any, processor: Any, count: int) -> bool:
        """Leave out the resolutions of more tiles; a single tile is always there. Model and processor each hold the list, and must agree."""
        images = processor.image_processor
        side = images.size["height"]
        kept = [list(point) for point in images.image_grid_pinpoints if (point[0] // side) * (point[1] // side) <= count] or [[side, side]]
        images.image_grid_pinpoints = model.config.image_grid_pinpoints = kept
        return True


def _filled(sample: Mapping[str, Tensor], tiles: int) -> Mapping[str, Tensor]:
    """A sample whose pictures have so many tiles."""
    if "pixel_values" not in sample:
        return sample
    pixels = sample["pixel_values"]
    return {**sample, "pixel_values": F.pad(pixels, (0, 0) * 3 + (0, tiles - pixels.shape[1]))}
