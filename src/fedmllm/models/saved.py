"""What leaves a run: a standard PEFT folder, read back; or a whole model with the adapter merged in."""

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
    """The model with the adapter of a PEFT folder, frozen.

    Raises:
        ModelError: if the folder holds no adapter in safetensors, or it does not fit the model.
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
    """Refuse an adapter of which tensors were left out, or left as they are drawn: PEFT does both in silence or nearly so."""
    from peft import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    problems = [f"the model has no place for {name}" for name in sorted(held - wanted)]
    problems += [f"the adapter lacks {name}" for name in sorted(wanted - held)]
    if problems:
        raise ModelError(f"{what}: {len(problems)} of its tensors do not match; use the model that it was trained on:\n{listing(problems)}")


def save_adapter(vlm: VisionLanguageModel, weights: Weights, folder: Path, base: Mapping[str, Tensor] | None = None) -> None:
    """Save as a folder that ``PeftModel.from_pretrained`` loads; a folder of that name is replaced as a whole.

    What was merged into the frozen weights becomes part of the adapter, which grows in rank to hold it.
    """
    model: Any = vlm.model
    write_weights(model, weights)
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    with written(folder):
        # "auto" would ask a hub whether the vocabulary was resized.
        model.save_pretrained(str(draft), save_embedding_layers=False)
        # PEFT's model card is a form to be filled in, which names the folder of the base model on this machine.
        (draft / "README.md").unlink(missing_ok=True)
        if base:
            _save_merged(draft, weights, base)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _save_merged(folder: Path, weights: Weights, base: Mapping[str, Tensor]) -> None:
    """Replace an adapter's factors by those of ``base + B A`` at the rank that holds it, and the rank in its settings."""
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
    """Save a model whose adapter is part of its weights, with its processor, as a Transformers folder in the model's number format.

    Args:
        vlm: with a loaded adapter, which it has no more afterwards.
        folder: where; it is there whole or not at all.

    Returns:
        how much of the adapters' change the number format loses, as a share of its Frobenius norm; about 0 in float32.

    Raises:
        RunError: if there is something at that place already, or it cannot be made.
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
    """Add every adapter to its frozen matrix, in float32, rounded once; what share of the change is lost by that."""
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
