"""What trains: attach it, read and write its tensors, and what is merged into the frozen ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedmllm.errors import ModelError
from fedmllm.models.beside import Beside, too_coarse
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.parts import LoraConfig, adapted_modules, whole_modules
from fedmllm.randomness import torch_randomness
from fedmllm.types import Weights


def attach_lora(vlm: VisionLanguageModel, config: LoraConfig, seed: int) -> VisionLanguageModel:
    """The model with what trains: adapters with A random, drawn from the seed, and B zero, so that nothing changes yet; whole modules.

    All that trains is float32, whatever the frozen weights are.

    Raises:
        ModelError: if what is asked for is not there.
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
    """Undo ``attach_lora`` and all that followed: the model that was given to it is as it was loaded."""
    from peft.utils import ModulesToSaveWrapper

    write_base(vlm, {})
    base = vlm.model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            # PEFT would leave the trained copy there.
            base.set_submodule(name, module.original_module)
    vlm.model.unload()


def widened(model: Any, dtype: torch.dtype) -> Any:
    """The model with its whole trained modules in float32, as PEFT holds adapters: steps smaller than bfloat16 tells apart would be lost.

    What leaves them is of the model's own format, which some decoders rely on.
    """
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and dtype != torch.float32:
            module.modules_to_save.float()
            module.register_forward_hook(lambda module, inputs, output: _in_format(output, dtype))
    return model


def _in_format(output: Any, dtype: torch.dtype) -> Any:
    """Tensors, or lists of them by picture, in a number format."""
    return output.to(dtype) if isinstance(output, Tensor) else [_in_format(part, dtype) for part in output]


@contextmanager
def without_deprecations() -> Iterator[None]:
    """PEFT reads an attribute that Transformers has renamed; the warning is theirs to heed and nothing a user can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def trainable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters under the names a PEFT file gives them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield _in_file(name), parameter


def _in_file(name: str) -> str:
    """A parameter's name where PEFT writes it."""
    return name.replace(".modules_to_save.default.", ".").replace("_vector.default.weight", "_vector").replace(".default.", ".")


@contextmanager
def training_only(model: nn.Module, chosen: Callable[[str], bool] | None) -> Iterator[None]:
    """In this block only the chosen trainable parameters train; all of them for None."""
    paused = [parameter for name, parameter in trainable(model) if chosen is not None and not chosen(name)]
    for parameter in paused:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in paused:
            parameter.requires_grad_(True)


def read_weights(model: nn.Module) -> Weights:
    """A float32 copy of the trainable parameters, on the CPU."""
    return {name: parameter.detach().to("cpu", torch.float32, copy=True) for name, parameter in trainable(model)}


def copies(own: Weights, weights: Weights) -> Weights:
    """Weights as the model would hold them, apart from it: in its order, on its device, in its number format.

    Args:
        own: the model's ``trainable`` tensors.
        weights: what to copy.

    Raises:
        ModelError: if names or shapes differ from the model's.
    """
    _require_fit(own, weights)
    return {name: weights[name].to(tensor.device, tensor.dtype, copy=True) for name, tensor in own.items()}


@torch.no_grad()
def write_weights(model: nn.Module, weights: Weights) -> None:
    """Set the trainable parameters.

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
    """The first difference in names or shapes, in words; None if there is none."""
    if missing := sorted(expected.keys() - weights.keys()):
        return f"{len(missing)} tensors are missing, e.g. {missing[0]}"
    if unknown := sorted(weights.keys() - expected.keys()):
        return f"{len(unknown)} tensors are unknown, e.g. {unknown[0]}"
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            return f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
    return None


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers by the names that their factors begin with."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def lora_scale(model: nn.Module) -> float:
    """LoRA's factor s: alpha / r, or alpha / sqrt(r) of rsLoRA."""
    return float(next(layer for _, layer in adapted_layers(model)).scaling["default"])


def has_dropout(model: nn.Module) -> bool:
    """Whether any part of the model draws random numbers in training."""
    rates = [module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", None) for module in model.modules()]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def frozen_weights(vlm: VisionLanguageModel) -> Weights:
    """The frozen matrices under the adapters, by module, as they were loaded; views, not copies; none that is held in few bits."""
    layers = [(name, layer) for name, layer in adapted_layers(vlm.model) if layer.get_base_layer().weight.is_floating_point()]
    return {name: vlm.originals.get(name, layer.get_base_layer().weight.detach()) for name, layer in layers}


@torch.no_grad()
def write_base(vlm: VisionLanguageModel, base: Mapping[str, Tensor]) -> None:
    """Let the frozen layers compute with what was loaded plus ``s base``, s being LoRA's scale.

    Matrices in float32 are set to the sum, always from a kept original. Beside others, whose format would lose much of a small change, it
    is held by itself (``models.beside``).

    Args:
        vlm: the model; modules that ``base`` does not name get their original back.
        base: by module, shape (outputs, inputs).

    Raises:
        ModelError: if a matrix is held in a quantized format, to which nothing can be added.
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
                raise ModelError(f"the method changes frozen weights, but {name} is held as {weight.dtype}; load the model in bfloat16")
            change = lora_scale(vlm.model) * base[name].to(weight.device, torch.float32)
            if too_coarse(weight.dtype):
                vlm.beside[name] = Beside(frozen, change)
            else:
                original = vlm.originals.setdefault(name, weight.detach().clone())
                weight.copy_(original.float() + change)
        elif name in vlm.originals:
            weight.copy_(vlm.originals.pop(name))
