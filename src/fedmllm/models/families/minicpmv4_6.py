"""MiniCPM-V 4.6: patches of all pictures stand side by side in one long strip."""

from __future__ import annotations

from types import MappingProxyType

from fedmllm.models.families.generic import ModelFamily


class MiniCPMV46(ModelFamily):
    """``pixel_values`` has shape (1, channels, patch, patch * number of patches); ``target_sizes`` says whose are which."""

    axes = MappingProxyType({"pixel_values": 3})
