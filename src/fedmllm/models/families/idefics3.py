"""Idefics3 and SmolVLM: a processor's pixels have a first axis for samples, a second for the tiles of their pictures."""

from __future__ import annotations

from types import MappingProxyType

from fedmllm.models.families.generic import ModelFamily


class Idefics3(ModelFamily):
    """All tiles of a batch stand in one row: the model takes them in order and does not care whose they are.

    Tiles have one size, so that rows of several samples fit together; in a row of its own each sample would have to be filled up
    with empty tiles to the most that one has.
    """

    axes = MappingProxyType({"pixel_values": 1, "pixel_attention_mask": 1})
