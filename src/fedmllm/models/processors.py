"""Loads a model's processor, without its video processor if that cannot be created."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_VIDEOS = re.compile(r"video.?processor|torchvision", re.IGNORECASE)
"""Matches errors that concern only video processors."""


def load_processor(source: str, **options: Any) -> Any:
    """Return the processor of a folder or hub id.

    Transformers creates video processors only with torchvision. If torchvision or the video settings are missing, the processor is
    created without its video processor, because models here get only images and text. The video settings are kept and saved with it.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, **options)
    except (ImportError, OSError, ValueError) as error:
        if not _VIDEOS.search(str(error)):
            raise
        return without_videos(_class_of(source, options)).from_pretrained(source, **options)


def needs_torchvision(processor: Any) -> bool:
    """Return whether plain Transformers needs torchvision to load the saved processor."""
    return "video_processor" in getattr(type(processor), "get_attributes", list)()


def _class_of(source: str, options: dict[str, Any]) -> Any:
    """Return the class named in the processor's settings, or the default class for the model type."""
    from transformers import AutoConfig, ProcessorMixin
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    try:
        named = ProcessorMixin.get_processor_dict(source, **options)[0].get("processor_class")
    except OSError:
        named = None
    return processor_class_from_name(named or PROCESSOR_MAPPING_NAMES[AutoConfig.from_pretrained(source, **options).model_type])


def _video_settings(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return a source's video settings. They are empty if it has none, and Transformers then uses the defaults for the model type."""
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "revision": options.get("revision")}
    for name, key in (("processor_config.json", "video_processor"), ("video_preprocessor_config.json", None)):
        if path := cached_file(source, name, **quiet):
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if found := values.get(key) if key else values:
                return dict(found)
    return {}


class NoVideos:
    """Placeholder for a video processor. Every attribute of it is None.

    Args:
        settings: the settings of the video processor that it replaces.
    """

    _auto_class = None

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self.settings = dict(settings or {})

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def without_videos(cls: Any) -> Any:
    """Return a subclass of the processor class that works without a video processor, or the class itself if it has none."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if "video_processor" not in cls.get_attributes():
        return cls
    loaders = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else cls.check_argument_for_proper_class(self, name, argument)

    def arguments(own: Any, /, source: str, processor_dict: Any = None, **options: Any) -> list[Any]:
        videos = NoVideos(_video_settings(source, options))
        return [loaders[name].from_pretrained(source, **options) if name in loaders else videos for name in own.get_attributes()]

    def to_dict(self: Any) -> dict[str, Any]:
        return {**cls.to_dict(self), "video_processor": self.video_processor.settings}

    changed: dict[str, Any] = {
        "check_argument_for_proper_class": check,
        "_get_arguments_from_pretrained": classmethod(arguments),
        "to_dict": to_dict,
    }
    return type(cls.__name__, (cls,), changed)
