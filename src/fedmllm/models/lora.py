"""LoRA on the decoder: attach it, read and write its tensors, save a standard PEFT folder."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fedmllm import factors
from fedmllm.errors import ModelError
from fedmllm.models.load import VisionLanguageModel
from fedmllm.randomness import torch_randomness
from fedmllm.types import Weights


class LoraConfig(BaseModel):
    """Low-rank adapters: ``W x`` becomes ``W x + (alpha / r) B A x`` (Hu et al., 2021, arXiv 2106.09685)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(8, gt=0)
    """Rank of the update."""
    alpha: float = Field(16, gt=0)
    """Scale; the update is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which an input of the adapter is zeroed in training."""
    targets: Literal["attention", "all-linear"] = "attention"
    """Which linear layers of the decoder: q, k, v, o, or the feed-forward layers too."""
    client_ranks: tuple[int, ...] = ()
    """Ranks of the clients in turn, e.g. ``[2, 4, 8]``, none above r; empty for r everywhere. The scale stays alpha / r."""

    @field_validator("client_ranks")
    @classmethod
    def _within(cls, ranks: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        r = info.data.get("r", 0)
        if wrong := [rank for rank in ranks if not 1 <= rank <= r]:
            raise ValueError(f"a client's rank must lie between 1 and r = {r}, is {wrong[0]}; raise lora.r")
        return ranks

    def rank_of(self, position: int) -> int | None:
        """The rank of the client at a position; None for r."""
        return self.client_ranks[position % len(self.client_ranks)] if self.client_ranks else None


def attach_lora(vlm: VisionLanguageModel, config: LoraConfig, seed: int) -> VisionLanguageModel:
    """The model with trainable adapters on its decoder: A random, drawn from the seed, B zero, so that nothing changes yet.

    Raises:
        ModelError: if no layer of the decoder matches the targets.
    """
    import peft

    pattern = vlm.family.lora_modules(vlm.model, config.targets)
    settings = peft.LoraConfig(r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=pattern, bias="none")
    try:
        with torch_randomness(vlm.device, seed, "lora"), without_deprecations():
            model = peft.get_peft_model(vlm.model, settings)
    except ValueError as error:
        raise ModelError(f"lora.targets: {config.targets} names no layer of {vlm.name!r}'s decoder ({pattern})") from error
    settings.base_model_name_or_path = vlm.name
    return replace(vlm, model=model)


def load_adapter(vlm: VisionLanguageModel, folder: Path) -> VisionLanguageModel:
    """The model with the adapter of a PEFT folder, frozen.

    Raises:
        ModelError: if the folder holds no adapter in safetensors, or it does not fit the model.
    """
    import peft

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no {name}; give a run folder or a PEFT adapter folder")
    try:
        with without_deprecations():
            model = peft.PeftModel.from_pretrained(vlm.model, str(folder))
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter does not fit model {vlm.name!r}: {' '.join(str(error).split())[:300]}") from error
    return replace(vlm, model=model.eval())


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
            yield name.replace(".default.", "."), parameter


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


def copies(model: nn.Module, weights: Weights) -> Weights:
    """Weights as the model would hold them, apart from it: in its order, on its device, in its number format.

    Raises:
        ModelError: if names or shapes differ from the model's.
    """
    return {name: weights[name].to(own.device, own.dtype, copy=True) for name, own in _fitting(model, weights).items()}


@torch.no_grad()
def write_weights(model: nn.Module, weights: Weights) -> None:
    """Set the trainable parameters.

    Raises:
        ModelError: if names or shapes differ from the model's.
    """
    for name, parameter in _fitting(model, weights).items():
        parameter.copy_(weights[name])


def _fitting(model: nn.Module, weights: Weights) -> Weights:
    """The model's own tensors, for weights that fit them."""
    own = dict(trainable(model))
    if mismatch := describe_mismatch(weights, own):
        raise ModelError(f"the weights do not fit the model: {mismatch}")
    return own


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
    """LoRA's factor alpha / r."""
    return float(next(layer for _, layer in adapted_layers(model)).scaling["default"])


def has_dropout(model: nn.Module) -> bool:
    """Whether any part of the model draws random numbers in training."""
    rates = [module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", None) for module in model.modules()]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def frozen_weights(vlm: VisionLanguageModel) -> Weights:
    """The frozen matrices under the adapters, by module, as they were loaded; views, not copies."""
    layers = adapted_layers(vlm.model)
    return {name: vlm.originals.get(name, layer.get_base_layer().weight.detach()) for name, layer in layers}


@torch.no_grad()
def write_base(vlm: VisionLanguageModel, base: Mapping[str, Tensor]) -> None:
    """Set the frozen matrices to what they were when loaded plus ``(alpha / r) base``, always from a kept original.

    Args:
        vlm: the model; modules that ``base`` does not name get their original back.
        base: by module, shape (outputs, inputs).

    Raises:
        ModelError: if a matrix is held in a quantized format, to which nothing can be added.
    """
    if not base and not vlm.originals:
        return
    for name, layer in adapted_layers(vlm.model):
        weight = layer.get_base_layer().weight
        if name in base:
            if not weight.is_floating_point():
                raise ModelError(f"the method changes frozen weights, but {name} is held as {weight.dtype}; load the model in bfloat16")
            original = vlm.originals.setdefault(name, weight.detach().clone())
            weight.copy_(original.float() + lora_scale(vlm.model) * base[name].to(weight.device, torch.float32))
        elif name in vlm.originals:
            weight.copy_(vlm.originals.pop(name))


def save_adapter(vlm: VisionLanguageModel, weights: Weights, folder: Path, base: Mapping[str, Tensor] | None = None) -> None:
    """Save as a folder that ``PeftModel.from_pretrained`` loads; a folder of that name is replaced as a whole.

    What was merged into the frozen weights becomes part of the adapter, which grows in rank to hold it.
    """
    model: Any = vlm.model
    write_weights(model, weights)
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    # "auto" would ask a hub whether the vocabulary was resized.
    model.save_pretrained(str(draft), save_embedding_layers=False)
    # PEFT's model card is a form to be filled in, which names the folder of the base model on this machine.
    (draft / "README.md").unlink(missing_ok=True)
    if base:
        _save_merged(draft, weights, base)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _save_merged(folder: Path, weights: Weights, base: Mapping[str, Tensor]) -> None:
    """Replace an adapter's tensors by factors of ``base + B A`` at the rank that holds it, and the rank in its settings."""
    merged = {module: tensor.double() + base[module].double().to(tensor.device) for module, tensor in factors.products(weights).items()}
    rank = max(int(torch.linalg.matrix_rank(tensor.float())) for tensor in merged.values()) or 1
    whole = {module: factors.Pair(torch.eye(t.shape[1], dtype=t.dtype), t) for module, t in merged.items()}
    save_file(factors.to_float((m, factors.compress(pair, rank)) for m, pair in whole.items()), str(folder / "adapter_model.safetensors"))
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"lora_alpha": settings["lora_alpha"] / settings["r"] * rank, "r": rank}
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
