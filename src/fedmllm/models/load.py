"""Loads a vision-language model: the embedded one, a Transformers folder or a hub id. All take the same path."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from packaging import version
from safetensors import SafetensorError

from fedmllm.errors import ModelError, listing
from fedmllm.models.checkpointing import checkpoint_layers
from fedmllm.models.families import family_of
from fedmllm.models.families.generic import ModelFamily
from fedmllm.models.fingerprint import fingerprint
from fedmllm.models.frozen_products import available, direct
from fedmllm.models.last_layer import narrow
from fedmllm.models.processors import load_processor
from fedmllm.models.quantized import four_bits, require_gpu
from fedmllm.models.separate_changes import SeparateChange
from fedmllm.models.settings import ModelConfig
from fedmllm.models.source import check_source, check_weights

if TYPE_CHECKING:
    from fedmllm.models.features import VisionFeatures

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisionLanguageModel:
    """A model with its processor and everything else needed to run it.

    Attributes:
        name: the name as the user wrote it.
        model: the Transformers model, or the PEFT model around it.
        processor: turns chats and images into tensors.
        family: what is specific to this family of models.
        device: the model's device.
        max_length: maximum number of tokens in a sequence.
        dtype: data type of the frozen weights.
        max_image_side: maximum length of an image's longer side in pixels; None applies only the processor's own limits.
        originals: the frozen matrices as loaded, by module, for those that a method has changed.
        beside: changes held separately from their frozen matrices, by module.
        features: cache of the frozen vision tower's outputs; None to compute them every time.
    """

    name: str
    model: Any
    processor: Any
    family: ModelFamily
    device: torch.device
    max_length: int
    dtype: torch.dtype = torch.float32
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    beside: dict[str, SeparateChange] = field(default_factory=dict)
    features: VisionFeatures | None = None
    max_image_side: int | None = None

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def pad_token_id(self) -> int:
        """The token used for padding; the end token if the tokenizer has no padding token."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for a forward pass: mixed precision if the frozen weights are bfloat16."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_device(device: str) -> torch.device:
    """Return a PyTorch device. ``auto`` is the GPU if there is one, else the CPU; any other name is a PyTorch device name.

    Raises:
        ModelError: if the name is unknown or the device is not available.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"engine.device: {device!r} cannot be used ({str(error).splitlines()[0]}); use auto or cpu") from error
    return chosen


OLDEST_TRANSFORMERS = "5.23"
"""The oldest supported version. Earlier models silently ignore precomputed image features and would train without the images."""


def require_transformers(installed: str) -> None:
    """Check the version of Transformers.

    Raises:
        ModelError: if it is older than ``OLDEST_TRANSFORMERS``.
    """
    if version.parse(installed) < version.parse(OLDEST_TRANSFORMERS):
        raise ModelError(
            f"Transformers {OLDEST_TRANSFORMERS} or later is required, {installed} is installed; pip install 'transformers>={OLDEST_TRANSFORMERS}'"
        )


def load_model(config: ModelConfig, device: torch.device) -> VisionLanguageModel:
    """Load a model and its processor. The model is frozen and in evaluation mode.

    Raises:
        ModelError: if the config, weights, processor or chat template are missing, the model's fingerprint differs from
            ``config.fingerprint``, its code is not trusted, or Transformers is too old.
    """
    require_transformers(metadata.version("transformers"))
    source, dtype = check_source(config), getattr(torch, config.dtype)
    check_weights(config.name, Path(source))
    if config.fingerprint is not None and (there := fingerprint_of(config)) != config.fingerprint:
        raise ModelError(
            f"model.name: {config.name!r} does not match model.fingerprint (found {there}, expected {config.fingerprint}); "
            "use the expected model, or accept this one with --force"
        )
    try:
        family, processor, model = _pretrained(config, source, dtype, device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.name: {config.name!r} {_what_failed(error)}") from error
    if not family.can_render(processor):
        raise ModelError(f"model.name: {config.name!r} has no chat template; use an instruction-tuned checkpoint")
    if config.max_slices is not None and not family.limit_slices(model, processor, config.max_slices):
        raise ModelError(f"model.max_slices: the processor of {config.name!r} does not slice images; use model.max_image_side")
    narrow(model.requires_grad_(False).eval())
    if config.onednn and device.type == "cpu" and available():
        direct(model)
    if config.gradient_checkpointing:
        checkpoint_layers(model, config.name)
    limit = min(config.max_length, context(model))
    return VisionLanguageModel(config.name, model, processor, family, device, limit, dtype, max_image_side=config.max_image_side)


def fingerprint_of(config: ModelConfig) -> str:
    """Return the fingerprint of a folder's or hub id's model; see ``fingerprint``. Files of a hub model are downloaded.

    Raises:
        ModelError: if the model does not exist or its files are damaged.
    """
    source = check_source(config)
    check_weights(config.name, Path(source))
    try:
        return fingerprint(source, config.revision)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"model.name: {config.name!r} {_what_failed(error)}") from error


def _pretrained(config: ModelConfig, source: str, dtype: torch.dtype, device: torch.device) -> tuple[ModelFamily, Any, Any]:
    """Load the family, processor and model of a folder or hub id, and put the model on the device."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    settings = transformers.AutoConfig.from_pretrained(source, **options)
    family, placed = family_of(settings.model_type), {}
    if config.quantization == "4bit":
        require_gpu("model.quantization: 4bit", device)
        placed = four_bits(dtype, device)
    elif getattr(settings, "quantization_config", None) is not None:
        require_gpu(f"model.name: {config.name!r}, whose weights are quantized,", device)
        placed = {"device_map": {"": str(device)}}
    processor = load_processor(source, **options)
    loader = getattr(transformers, family.auto_class)
    model, found = loader.from_pretrained(source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options, **placed)
    _require_all(config.name, found)
    return family, processor, model if placed else model.to(device)


def _require_all(name: str, found: Mapping[str, Collection[str]]) -> None:
    """Reject a model with tensors that no file contains, which Transformers would initialize at random. Tied tensors are not missing."""
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"model.name: {name!r} cannot be loaded: {len(missing)} of the model's tensors are missing from its *.safetensors; download it again:\n"
            f"{listing(missing)}"
        )
    if unexpected := sorted(found["unexpected_keys"]):
        shown = ", ".join(unexpected[:3])
        _LOG.warning("model.name: %r: the model does not use %d of the tensors in its *.safetensors, e.g. %s", name, len(unexpected), shown)


def _what_failed(error: Exception) -> str:
    """Return why a model cannot be loaded, and the remedy."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "comes with its own code, which was not run; read it, then set model.trust_remote_code to true and model.revision to its commit"
        )
    if "gated repo" in text:
        return "is gated; accept its terms on its hub page, and log in with 'hf auth login' (or set HF_TOKEN)"
    if "couldn't connect" in text or "outgoing traffic has been disabled" in text:
        return (
            "is not a folder, is not in the hub's cache, and the hub cannot be reached; download it on a machine with access, with "
            "'hf download NAME --local-dir FOLDER', and set model.name to that folder"
        )
    return f"cannot be loaded: {text[:400]}"


def context(model: Any) -> int:
    """Return the maximum number of tokens that the model itself supports."""
    text = model.config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or 1 << 30)
