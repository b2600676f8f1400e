"""Idefics3 and SmolVLM: the processor's pixels have one axis for samples and a second axis for the tiles of their images."""

from __future__ import annotations

from math import isqrt
from types import MappingProxyType
from typing import Any

from fedmllm.models.families.generic import ModelFamily


class Idefics3(ModelFamily):
    """Puts all tiles of a batch in a single row, because the model reads tiles in order and ignores which row they are in.

    All tiles have the same size, so the tiles of several samples fit into one row. With a row per sample, every row would need padding
    with empty tiles up to the longest one.
    """

    axes = MappingProxyType({"pixel_values": 1, "pixel_attention_mask": 1})

    def limit_slices(self, model: Any, processor: Any, count: int) -> bool:
        """Limit the longest side to that of n tiles, which gives at most n * n tiles. The processor resizes images before it cuts them."""
        images = processor.image_processor
        longest = isqrt(count) * images.max_image_size["longest_edge"]
        images.size = {"longest_edge": min(longest, images.size["longest_edge"])}
        return bool(images.do_image_splitting)
