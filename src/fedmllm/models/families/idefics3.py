"""Idefics3 and SmolVLM: a processor's pixels have a first axis for samples, a second for the tiles of their pictures."""

from __future__ import annotations

from math import isqrt
from types import MappingProxyType
from typing import Any

from fedmllm.models.families.generic import ModelFamily


class Idefics3(ModelFamily):
    """All tiles of a batch stand in one row: the model takes them in order and does not care whose they are.

    Tiles have one size, so that rows of several samples fit together; in a row of its own each sample would have to be filled up
    with empty tiles to the most that one has.
    """

    axes = MappingProxyType({"pixel_values": 1, "pixel_attention_mask": 1})

    def limit_slices(self, model: Any, processor: Any, count: int) -> bool:
        """A picture is brought to a longest side and then cut: into n * n tiles at most if the side is that of n tiles."""
        images = processor.image_processor
        longest = isqrt(count) * images.max_image_size["longest_edge"]
        images.size = {"longest_edge": min(longest, images.size["longest_edge"])}
        return bool(images.do_image_splitting)
