"""Loading a model's processor, without its part for videos if that cannot be made."""

from __future__ import annotations

from typing import Any


def load_processor(source: str, **options: Any) -> Any:
    """The processor of a folder or hub id.

    Transformers makes processors of videos with torchvision only. Where that, or the processor's settings for videos, are missing, it
    is made without: pictures and text, all that is fed to models here, need neither.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, **options)
    except (ImportError, OSError) as error:
        if "video processor" not in str(error) and "VideoProcessor" not in str(error):
            raise
        return without_videos(_class_of(source, options)).from_pretrained(source, **options)


def _class_of(source: str, options: dict[str, Any]) -> Any:
    """The class that the processor's settings name, else that of the kind of model."""
    from transformers import AutoConfig, ProcessorMixin
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    try:
        named = ProcessorMixin.get_processor_dict(source, **options)[0].get("processor_class")
    except OSError:
        named = None
    return processor_class_from_name(named or PROCESSOR_MAPPING_NAMES[AutoConfig.from_pretrained(source, **options).model_type])


class NoVideos:
    """Stands where a video processor would: every setting is None."""

    _auto_class = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def without_videos(cls: Any) -> Any:
    """The processor class with its checks and its loading told that there is no video processor; itself if it wants none."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if "video_processor" not in cls.get_attributes():
        return cls
    loaders = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else cls.check_argument_for_proper_class(self, name, argument)

    def arguments(own: Any, /, source: str, processor_dict: Any = None, **options: Any) -> list[Any]:
        return [loaders[name].from_pretrained(source, **options) if name in loaders else NoVideos() for name in own.get_attributes()]

    def to_dict(self: Any) -> dict[str, Any]:
        return {name: value for name, value in cls.to_dict(self).items() if name != "video_processor"}

    changed: dict[str, Any] = {
        "check_argument_for_proper_class": check,
        "_get_arguments_from_pretrained": classmethod(arguments),
        "to_dict": to_dict,
    }
    return type(cls.__name__, (cls,), changed)
