"""Estimates what fine-tuning a model takes from its config alone: parameters, bytes to send, and memory per token of a pass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedmllm.errors import ModelError
from fedmllm.models.checkpointing import checkpoint_layers
from fedmllm.models.families import family_of
from fedmllm.models.families.generic import ModelFamily
from fedmllm.models.lora import without_deprecations
from fedmllm.models.memory import OPTIMIZED_BYTES, peak_bytes
from fedmllm.models.parts import LoraConfig, Part, adapted_modules, parts, whole_modules
from fedmllm.models.quantized import BITS
from fedmllm.models.settings import ModelConfig
from fedmllm.models.source import check_source
from fedmllm.randomness import torch_randomness

_TOKENS = 128
"""Number of tokens in the measured pass."""


@dataclass(frozen=True)
class Plan:
    """The estimated cost of training a model.

    Attributes:
        parameters: number of parameters of the whole model.
        parts: what can train, and what does.
        weight_bytes: memory of the frozen weights.
        bytes_per_token: peak memory of a training pass per token of the batch, padding included.
    """

    parameters: int
    parts: tuple[Part, ...]
    weight_bytes: int
    bytes_per_token: float

    @property
    def trainable(self) -> int:
        """Number of parameters that train."""
        return sum(part.parameters for part in self.parts if part.trains)

    @property
    def update_bytes(self) -> int:
        """Bytes that one client sends in one round, and also receives, in float32."""
        return 4 * self.trainable

    def memory(self, tokens: int, clients: int = 1) -> float:
        """Return the peak memory of a step in bytes.

        It is the sum of the frozen weights, the parallel clients' trainable tensors with gradients and optimizer states, and the pass.

        Args:
            tokens: tokens in the pass, padding included.
            clients: number of parallel clients.
        """
        return self.weight_bytes + OPTIMIZED_BYTES * self.trainable * clients + self.bytes_per_token * tokens


def make_plan(config: ModelConfig, lora: LoraConfig) -> Plan:
    """Estimate the cost of training a model from its config, in a folder or on the hub, without loading its weights.

    Parameters are counted on the meta device. The memory of a pass is measured on a decoder of full width with one and two layers, random
    weights and a small vocabulary, and extrapolated to all layers. No formula depends on the architecture.

    Raises:
        ModelError: if the config does not exist, Transformers cannot build the model as an image-text-to-text model, or the model lacks
            the layers that should train.
    """
    import transformers

    source, trust = check_source(config), config.trust_remote_code
    try:
        settings = transformers.AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=trust)
        family = family_of(settings.model_type)
        with torch.device("meta"):
            model = getattr(transformers, family.auto_class).from_config(settings, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model.name: {config.name!r} cannot be planned: {' '.join(str(error).split())[:300]}") from error
    adapted_modules(model, family, lora)
    whole_modules(model, family, lora)
    pattern = re.compile(family.lora_modules(model, lora.targets))
    parameters = sum(weight.numel() for weight in model.parameters())
    try:
        needed = _bytes_per_token(settings.get_text_config(), pattern, config, lora)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"model.name: the decoder of {config.name!r} cannot be planned: {' '.join(str(error).split())[:300]}") from error
    return Plan(parameters, tuple(parts(model, family, lora)), round(_weight_bytes(model, family, config)), needed)


def _weight_bytes(model: Any, family: ModelFamily, config: ModelConfig) -> float:
    """Return the memory of the frozen weights in bytes, with quantization."""
    whole = {id(module) for name in family.connector(model) for module in model.get_submodule(name).modules()} | {
        id(model.get_output_embeddings())
    }
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in whole]
    few = sum(module.weight.numel() for module in linear) if config.quantization == "4bit" else 0
    width: int = getattr(torch, config.dtype).itemsize
    rest: int = sum(weight.numel() for weight in model.parameters()) - few
    return few * BITS / 8 + rest * width


def _bytes_per_token(text: Any, pattern: re.Pattern[str], config: ModelConfig, lora: LoraConfig) -> float:
    """Return the peak memory of a pass per token, extrapolated from one and two layers of each type in the decoder."""
    kinds = list(getattr(text, "layer_types", None) or ["layer"] * text.num_hidden_layers)
    alone = {kind: _needed(text, [kind], pattern, config, lora) for kind in dict.fromkeys(kinds)}
    further = {kind: _needed(text, [kind, kind], pattern, config, lora) - alone[kind] for kind in alone}
    outside = max(alone[kind] - further[kind] for kind in alone)
    return (outside + sum(further[kind] for kind in kinds)) / _TOKENS


def _needed(text: Any, kinds: list[str], pattern: re.Pattern[str], config: ModelConfig, lora: LoraConfig) -> int:
    """Return the peak memory of a forward and backward pass through a decoder with these layers, in bytes."""
    import peft
    from transformers import AutoModel

    changes: dict[str, Any] = {
        "num_hidden_layers": len(kinds),
        "vocab_size": 256,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if getattr(text, "layer_types", None):
        changes["layer_types"] = kinds
    dtype = getattr(torch, config.dtype)
    with torch_randomness(torch.device("cpu"), 0, "plan"):
        decoder = AutoModel.from_config(type(text)(**{**text.to_dict(), **changes})).to(dtype).requires_grad_(False)
    names = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear) and _ends_alike(pattern, name)}
    with without_deprecations():
        model = peft.get_peft_model(decoder, peft.LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=sorted(names)))
    if config.gradient_checkpointing:
        checkpoint_layers(decoder, config.name)
    embedded = torch.zeros(1, _TOKENS, text.hidden_size, dtype=dtype)

    def work() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            hidden = model.train()(inputs_embeds=embedded, use_cache=False).last_hidden_state
        hidden.backward(torch.zeros_like(hidden))

    return peak_bytes(work)


def _ends_alike(pattern: re.Pattern[str], name: str) -> bool:
    """Return whether the whole model's pattern matches a module of its decoder, given the module's name inside the decoder."""
    return bool(re.search(rf"(^|\.)({pattern.pattern.rsplit('(', 1)[1]}$", name))
