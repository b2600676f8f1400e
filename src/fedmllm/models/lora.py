"""The trainable tensors: attaches adapters, reads and writes tensors, and changes the frozen matrices under adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedmllm.errors import ModelError
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.parts import LoraConfig, adapted_modules, whole_modules
from fedmllm.models.separate_changes import SeparateChange, too_coarse
from fedmllm.randomness import torch_randomness
from fedmllm.types import Weights


def attach_lora(vlm: VisionLanguageModel, config: LoraConfig, seed: int) -> VisionLanguageModel:
    """Return the model with its trainable tensors: adapters and, if configured, fully trained modules.

    A is drawn from the seed and B is zero, so that the model's output does not change. All trainable tensors are float32, whatever the data
    type of the frozen weights.

    Raises:
        ModelError: if the model lacks layers that the settings name.
    """
    import peft

    whole, head = whole_modules(vlm.model, vlm.family, config), vlm.model.get_output_embeddings()
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=adapted_modules(vlm.model, vlm.family, config),
        modules_to_save=whole or None,
        ensure_weight_tying=config.embeddings == "full" and head is not None and head.weight is vlm.model.get_input_embeddings().weight,
        use_rslora=config.rslora,
        use_dora=config.dora,
        bias="none",
    )
    with torch_randomness(vlm.device, seed, "lora"), without_deprecations():
        model = peft.get_peft_model(vlm.model, settings)
    settings.base_model_name_or_path = vlm.name
    return replace(vlm, model=widened(model, vlm.dtype))


def detach_lora(vlm: VisionLanguageModel) -> None:
    """Undo ``attach_lora`` and later changes, so that the original model is as it was loaded."""
    from peft.utils import ModulesToSaveWrapper

    write_base(vlm, {})
    base = vlm.model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            # PEFT would leave the trained copy in place.
            base.set_submodule(name, module.original_module)
    vlm.model.unload()


def widened(model: Any, dtype: torch.dtype) -> Any:
    """Convert fully trained modules to float32, as PEFT does with adapters. bfloat16 would lose small optimizer steps.

    Their outputs are converted back to the model's data type, which some decoders rely on.
    """
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and dtype != torch.float32:
            module.modules_to_save.float()
            module.register_forward_hook(lambda module, inputs, output: _in_format(output, dtype))
    return model


def _in_format(output: Any, dtype: torch.dtype) -> Any:
    """Convert a tensor, or lists of tensors by image, to a data type."""
    return output.to(dtype) if isinstance(output, Tensor) else [_in_format(part, dtype) for part in output]


@contextmanager
def without_deprecations() -> Iterator[None]:
    """Suppress a warning that PEFT triggers by reading an attribute renamed in Transformers. Users cannot act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def trainable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the trainable parameters under their names in a PEFT file."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield _in_file(name), parameter


def _in_file(name: str) -> str:
    """Return a parameter's name in a PEFT file."""
    return name.replace(".modules_to_save.default.", ".").replace("_vector.default.weight", "_vector").replace(".default.", ".")


@contextmanager
def training_only(model: nn.Module, chosen: Callable[[str], bool] | None) -> Iterator[None]:
    """Train only the chosen parameters in this block, or all of them if ``chosen`` is None."""
    paused = [parameter for name, parameter in trainable(model) if chosen is not None and not chosen(name)]
    for parameter in paused:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in paused:
            parameter.requires_grad_(True)


def read_weights(model: nn.Module) -> Weights:
    """Return a float32 copy of the trainable parameters on the CPU."""
    return {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in trainable(model)}


def copies(own: Weights, weights: Weights) -> Weights:
    """Return copies of weights in the model's order, on its device and in its data types, separate from the model.

    Args:
        own: the model's ``trainable`` tensors.
        weights: the weights to copy.

    Raises:
        ModelError: if names or shapes differ from the model's.
    """
    _require_fit(own, weights)
    return {name: weights[name].to(tensor.device, tensor.dtype, copy=True) for name, tensor in own.items()}


@torch.no_grad()
def write_weights(model: nn.Module, weights: Weights) -> None:
    """Set the model's trainable parameters to the given weights.

    Raises:
        ModelError: if names or shapes differ from the model's.
    """
    own = dict(trainable(model))
    _require_fit(own, weights)
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def _require_fit(own: Weights, weights: Weights) -> None:
    if mismatch := describe_mismatch(weights, own):
        raise ModelError(f"the weights do not fit the model: {mismatch}")


def describe_mismatch(weights: Weights, expected: Weights) -> str | None:
    """Return the first difference in names or shapes as text; None if there is none."""
    if missing := sorted(expected.keys() - weights.keys()):
        return f"{len(missing)} tensors are missing, e.g. {missing[0]}"
    if unknown := sorted(weights.keys() - expected.keys()):
        return f"{len(unknown)} tensors are unknown, e.g. {unknown[0]}"
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            return f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
    return None


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's layers and their names, which are the prefixes of their factors' names."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def lora_scale(model: nn.Module) -> float:
    """Return LoRA's scale s: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    return float(next(layer for _, layer in adapted_layers(model)).scaling["default"])


def has_dropout(model: nn.Module) -> bool:
    """Return whether any module of the model uses dropout in training."""
    rates = [module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", None) for module in model.modules()]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def frozen_weights(vlm: VisionLanguageModel) -> Weights:
    """Return the frozen matrices under the adapters as loaded, by module. They are views, not copies; quantized ones are left out."""
    layers = [(name, layer) for name, layer in adapted_layers(vlm.model) if layer.get_base_layer().weight.is_floating_point()]
    return {name: vlm.originals.get(name, layer.get_base_layer().weight.detach()) for name, layer in layers}


@torch.no_grad()
def write_base(vlm: VisionLanguageModel, base: Mapping[str, Tensor]) -> None:
    """Make the frozen layers compute with the loaded matrices plus ``s base``, where s is LoRA's scale.

    A float32 matrix is set to the sum, always computed from a stored copy of the original. In lower precision, where the sum would lose
    much of a small change, ``s base`` is held separately (``models.separate_changes``).

    Args:
        vlm: the model. Modules that ``base`` does not contain are restored to their originals.
        base: the changes by module, each of shape (outputs, inputs).

    Raises:
        ModelError: if a matrix is quantized, because nothing can be added to it.
    """
    if not base and not vlm.originals and not vlm.beside:
        return
    for name, layer in adapted_layers(vlm.model):
        frozen = layer.get_base_layer()
        weight = frozen.weight
        if name in vlm.beside:
            vlm.beside.pop(name).remove()
        if name in base:
            if not weight.is_floating_point():
                raise ModelError(
                    f"the method changes frozen weights, but {name} is quantized to {weight.dtype}; load the model in bfloat16"
                )
            change = lora_scale(vlm.model) * base[name].to(weight.device, torch.float32)
            if too_coarse(weight.dtype):
                vlm.beside[name] = SeparateChange(frozen, change)
            else:
                original = vlm.originals.setdefault(name, weight.detach().clone())
                weight.copy_(original.float() + change)
        elif name in vlm.originals:
            weight.copy_(vlm.originals.pop(name))
