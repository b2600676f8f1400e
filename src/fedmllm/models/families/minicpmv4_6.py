"""MiniCPM-V 4.6: the patches of all images are concatenated into one long strip."""

from __future__ import annotations

from types import MappingProxyType

from fedmllm.models.families.generic import ModelFamily


class MiniCPMV46(ModelFamily):
    """``pixel_values`` has shape (1, channels, patch, patch * number of patches); ``target_sizes`` assigns patches to images."""

    axes = MappingProxyType({"pixel_values": 3})
