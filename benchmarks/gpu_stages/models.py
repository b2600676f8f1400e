"""Models in their own architectures and real dimensions with random weights, created on the device, and artificial samples for them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image

from fedmllm.models.encoding import Encoded, encode
from fedmllm.models.families import family_of
from fedmllm.models.features import VisionFeatures
from fedmllm.models.last_layer import narrow, shorten
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import attach_lora
from fedmllm.models.parts import LoraConfig
from fedmllm.types import Message, Part
from gpu_stages.bench import Bench

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import tiny_models

QWEN_VISION = {
    **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14},
    **{"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
}
QWEN_TEXT = {
    **{"head_dim": 128, "max_position_embeddings": 32768},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN2_5_VL_3B = {
    "text_config": {
        **{"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2},
        **{"vocab_size": 151936, "tie_word_embeddings": True, **QWEN_TEXT},
    },
    "vision_config": {**QWEN_VISION, "out_hidden_size": 2048},
    "tie_word_embeddings": True,
}
QWEN2_5_VL_7B = {
    "text_config": {
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
        **{"vocab_size": 152064, "tie_word_embeddings": False, **QWEN_TEXT},
    },
    "vision_config": {**QWEN_VISION, "out_hidden_size": 3584},
    "tie_word_embeddings": False,
}
MINICPM_V_4_6 = {
    "text_config": {
        **{"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2},
        **{"head_dim": 256, "vocab_size": 248320, "max_position_embeddings": 32768, "tie_word_embeddings": True},
        **{"linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
        | {"partial_rotary_factor": 0.25},
    },
    "vision_config": {
        **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
        **{"image_size": 980, "patch_size": 14},
    },
    **{"insert_layer_id": 6, "image_size": 448, "tie_word_embeddings": True},
}
"""MiniCPM-V 4.6's decoder has the heads of the Qwen3.5 model of the same width."""
SMOLVLM_256M = {
    "text_config": {
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
        **{"head_dim": 64, "vocab_size": 49280, "max_position_embeddings": 8192, "tie_word_embeddings": False},
    },
    "vision_config": {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        **{"image_size": 512, "patch_size": 16},
    },
    **{"scale_factor": 4, "tie_word_embeddings": False},
}
"""The decoder of SmolVLM-256M has 135 million parameters."""


@dataclass(frozen=True)
class Size:
    """The size of a model.

    Attributes:
        kind: a kind of ``examples/tiny_models.py``.
        dimensions: those of the published model, which replace the tiny model's.
        images: settings of its image processor, for pictures of 448 x 448.
    """

    kind: str
    dimensions: dict[str, Any]
    images: dict[str, Any] = field(default_factory=dict)

    def settings(self, token: Any, tiny: bool = False) -> dict[str, Any]:
        """Return the settings of the model's config, given a function from a token to its id."""
        settings = tiny_models.RECIPES[self.kind].config(token)
        if tiny:
            return settings
        inner = {name: {**value, **self.dimensions.get(name, {})} for name, value in settings.items() if isinstance(value, dict)}
        return {**settings, **inner, **{name: value for name, value in self.dimensions.items() if not isinstance(value, dict)}}


_QWEN_IMAGES = {"min_pixels": 448 * 448, "max_pixels": 448 * 448, "patch_size": 14}
SIZES = {
    "3b": Size("qwen2_5_vl", QWEN2_5_VL_3B, _QWEN_IMAGES),
    "7b": Size("qwen2_5_vl", QWEN2_5_VL_7B, _QWEN_IMAGES),
    "minicpm": Size("minicpmv4_6", MINICPM_V_4_6, {"scale_resolution": 448, "patch_size": 14, "max_slice_nums": 9}),
    "135m": Size("idefics3", SMOLVLM_256M),
}
"""Sizes of published models."""


def build(
    bench: Bench, name: str, dtype: torch.dtype = torch.bfloat16, changes: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> VisionLanguageModel:
    """Return a frozen model with random weights on the device, without adapters.

    Args:
        bench: the device, and whether models are tiny.
        name: a name of ``SIZES``.
        dtype: the weights' number format.
        changes: changes to the dimensions, by ``text_config`` and ``vision_config``; ignored if models are tiny.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    size = SIZES[name]
    processor = tiny_models.processor(size.kind, None if bench.tiny else size.images)
    settings = size.settings(processor.tokenizer.convert_tokens_to_ids, bench.tiny)
    for part, values in ({"text_config": {"vocab_size": len(processor.tokenizer)}} if bench.tiny else changes).items():
        settings[part] = {**settings[part], **values}
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(size.kind, **settings), dtype=dtype)
    narrow(model.requires_grad_(False).eval())
    return VisionLanguageModel(name, model, processor, family_of(size.kind), bench.device, 1 << 20, dtype)


def adapted(vlm: VisionLanguageModel, features: bool = True) -> VisionLanguageModel:
    """Return the model as a run uses it: with adapters of rank 8, stored picture features and a shortened last layer."""
    if features:
        vlm = replace(vlm, features=VisionFeatures(vlm, 1 << 30))
    vlm = attach_lora(vlm, LoraConfig(), 0)
    shorten(vlm.model)
    return vlm


PICTURES = 8
"""Number of different pictures among the samples."""


def samples(
    vlm: VisionLanguageModel, count: int, tokens: int, spread: float = 1 / 12, pictured: bool = True, seed: int = 0
) -> list[Encoded]:
    """Return artificial samples: a picture of noise, a question of random words, and an answer, with ``tokens`` tokens on average.

    Args:
        vlm: the model, for its processor.
        count: number of samples.
        tokens: mean tokens per sample.
        spread: lengths are uniform between ``(1 - spread) tokens`` and ``(1 + spread) tokens``; 0 for equal lengths.
        pictured: whether samples have pictures.
        seed: the seed of all random numbers.
    """
    rng = np.random.default_rng(seed)
    turns = [_turn(rng, pictured) for _ in range(PICTURES)]
    bases = [encode(vlm, turn, "yes") for turn in turns]
    words = torch.tensor(vlm.tokenizer("number written which", add_special_tokens=False)["input_ids"])
    lengths = rng.uniform((1 - spread) * tokens, (1 + spread) * tokens, count).round().astype(int)
    return [_stretched(bases[i % PICTURES], int(length), words, rng) for i, length in enumerate(lengths)]


def _turn(rng: np.random.Generator, pictured: bool) -> Sequence[Message]:
    picture = Image.fromarray(rng.integers(0, 256, (448, 448, 3), dtype=np.uint8))
    return (Message("user", ((Part("image", picture),) if pictured else ()) + (Part("text", "Which?"),)),)


def _stretched(sample: Encoded, length: int, words: torch.Tensor, rng: np.random.Generator) -> Encoded:
    """Return the sample, extended to ``length`` tokens with random words before its answer; unchanged if it is longer."""
    missing = max(0, length - len(sample.input_ids))
    drawn = words[torch.from_numpy(rng.integers(len(words), size=missing))]

    def with_gap(row: torch.Tensor, between: torch.Tensor) -> torch.Tensor:
        return torch.cat([row[: -sample.answer_length], between.to(row.dtype), row[-sample.answer_length :]])

    by_token = {name: with_gap(row, torch.zeros(missing)) for name, row in sample.by_token.items()}
    return replace(sample, input_ids=with_gap(sample.input_ids, drawn), by_token=by_token)
