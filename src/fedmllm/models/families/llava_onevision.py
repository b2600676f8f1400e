"""LLaVA-OneVision: images are resized to one of several resolutions and cut into tiles of equal size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fedmllm.models.families.generic import ModelFamily


class LlavaOneVision(ModelFamily):
    """``pixel_values`` has shape (images, tiles, channels, side, side). The model computes an image's number of tiles from its size."""

    def batch(self, extras: Sequence[Mapping[str, Tensor]], shifts: Sequence[int]) -> dict[str, Any]:
        """Pad images with empty tiles up to the largest number of tiles, then combine the samples."""
        most = max((sample["pixel_values"].shape[1] for sample in extras if "pixel_values" in sample), default=0)
        return super().batch([_filled(sample, most) for sample in extras], shifts)

    def limit_slices(self, model: Any, processor: Any, count: int) -> bool:
        """Remove resolutions with more tiles, but keep at least a single tile. Model and processor each hold the list and must agree."""
        images = processor.image_processor
        side = images.size["height"]
        kept = [list(point) for point in images.image_grid_pinpoints if (point[0] // side) * (point[1] // side) <= count] or [[side, side]]
        images.image_grid_pinpoints = model.config.image_grid_pinpoints = kept
        return True


def _filled(sample: Mapping[str, Tensor], tiles: int) -> Mapping[str, Tensor]:
    """Pad a sample's images with empty tiles to a given number of tiles."""
    if "pixel_values" not in sample:
        return sample
    pixels = sample["pixel_values"]
    return {**sample, "pixel_values": F.pad(pixels, (0, 0) * 3 + (0, tiles - pixels.shape[1]))}
