"""Saves and loads adapters as standard PEFT folders, and saves models with the adapter merged in."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmllm import factors
from fedmllm.errors import ModelError, listing
from fedmllm.files import require_new_folder, written
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import adapted_layers, widened, without_deprecations, write_weights
from fedmllm.types import Weights


def load_adapter(vlm: VisionLanguageModel, folder: Path) -> VisionLanguageModel:
    """Return the model with the adapter of a PEFT folder, frozen.

    Raises:
        ModelError: if the folder contains no adapter in safetensors, or the adapter does not fit the model.
    """
    import peft

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no {name}; give a run folder or a PEFT adapter folder")
    try:
        with without_deprecations(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = peft.PeftModel.from_pretrained(vlm.model, str(folder))
            with safe_open(folder / "adapter_model.safetensors", "pt") as file:
                held = set(file.keys())
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter does not fit model {vlm.name!r}: {' '.join(str(error).split())[:300]}") from error
    _require_fit(f"{folder}: the adapter does not fit model {vlm.name!r}", model, held)
    return replace(vlm, model=widened(model.eval(), vlm.dtype))


def _require_fit(what: str, model: Any, held: Set[str]) -> None:
    """Reject an adapter whose tensor names differ from the model's. PEFT drops extra tensors and keeps random values for missing ones."""
    from peft import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    problems = [f"the model has no place for {name}" for name in sorted(held - wanted)]
    problems += [f"the adapter lacks {name}" for name in sorted(wanted - held)]
    if problems:
        raise ModelError(f"{what}: {len(problems)} of its tensors do not match; use the model that it was trained on:\n{listing(problems)}")


def save_adapter(vlm: VisionLanguageModel, weights: Weights, folder: Path, base: Mapping[str, Tensor] | None = None) -> None:
    """Save an adapter as a folder that ``PeftModel.from_pretrained`` loads. An existing folder is replaced.

    Args:
        vlm: the model with adapters attached.
        weights: the weights to save.
        folder: the folder to write.
        base: changes merged into the frozen weights, by module. They are added to the adapter, whose rank grows accordingly.
    """
    model: Any = vlm.model
    write_weights(model, weights)
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    with written(folder):
        # "auto" would query the hub to find out whether the vocabulary was resized.
        model.save_pretrained(str(draft), save_embedding_layers=False)
        # PEFT's model card is an unfilled template that contains the local path of the base model.
        (draft / "README.md").unlink(missing_ok=True)
        if base:
            _save_merged(draft, weights, base)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _save_merged(folder: Path, weights: Weights, base: Mapping[str, Tensor]) -> None:
    """Replace an adapter's factors with factors of ``base + B A`` at its exact rank, and update the rank in the adapter's settings."""
    merged = {module: tensor.double() + base[module].double().to(tensor.device) for module, tensor in factors.products(weights).items()}
    rank = max(int(torch.linalg.matrix_rank(tensor.float())) for tensor in merged.values()) or 1
    whole = {module: factors.Pair(torch.eye(t.shape[1], dtype=t.dtype), t) for module, t in merged.items()}
    held = factors.to_float((module, factors.compress(pair, rank)) for module, pair in whole.items())
    save_file(factors.others(weights) | held, str(folder / "adapter_model.safetensors"))
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    growth = rank / settings["r"]
    settings |= {"lora_alpha": settings["lora_alpha"] * (growth**0.5 if settings["use_rslora"] else growth), "r": rank}
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def save_merged(vlm: VisionLanguageModel, folder: Path) -> float:
    """Merge the adapter into the model and save it with its processor as a Transformers folder, in the model's data type.

    Args:
        vlm: a model with a loaded adapter. The adapter is removed from it.
        folder: the folder to create. It is written completely or not at all.

    Returns:
        the share of the adapters' change, by Frobenius norm, that is lost to rounding; about 0 in float32.

    Raises:
        RunError: if the folder exists or cannot be created.
    """
    require_new_folder(folder)
    lost = _merge(vlm)
    merged: Any = vlm.model.unload().to(vlm.dtype)
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    with written(folder):
        merged.save_pretrained(str(draft))
        vlm.processor.save_pretrained(str(draft))
        draft.rename(folder)
    return lost


@torch.no_grad()
def _merge(vlm: VisionLanguageModel) -> float:
    """Add every adapter to its frozen matrix in float32, round once, and return the share of the change that is lost."""
    lost = total = 0.0
    for _, layer in adapted_layers(vlm.model):
        frozen = layer.get_base_layer()
        before = frozen.weight.detach().clone()
        frozen.weight.data = before.float()
        layer.merge()
        whole = frozen.weight.detach()
        frozen.weight.data = whole.to(before.dtype)
        total += float((whole - before).square().sum())
        lost += float((whole - frozen.weight).square().sum())
    return (lost / total) ** 0.5 if total else 0.0
