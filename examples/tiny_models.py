"""Tiny models of real architectures, with random weights and their own processors: ``python examples/tiny_models.py qwen3_vl FOLDER``.

They learn nothing useful, but they run the same code as the full models, in seconds and without a download.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LLAMA = {
    **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512},
}
QWEN2 = {**LLAMA, "model_type": "qwen2"}
SIGLIP = {
    **{"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "image_size": 32, "patch_size": 8, "vision_use_head": False},
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

PINPOINTS = [[32, 64], [64, 32], [32, 96]]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat format; those of most families are variants of it. IMAGE is the placeholder for a picture."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a tiny model.

    Attributes:
        config: returns the architecture's settings, given a function from a token to its id.
        images: the class of the image processor and its settings.
        tokens: the tokenizer's special tokens, by the names that processors use for them.
        image: the text that the chat template writes for a picture; None for no chat template.
        processor: further settings of the processor.
    """

    config: Callable[[Callable[[str], int]], dict[str, Any]]
    images: tuple[str, dict[str, Any]]
    tokens: dict[str, str] = field(default_factory=lambda: {"image_token": "<image>"})
    image: str | None = "<image>"
    processor: dict[str, Any] = field(default_factory=dict)


QWEN_TOKENS = {
    **{"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    **{"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def qwen_ids(token: Callable[[str], int]) -> dict[str, int]:
    """Return the token ids of Qwen's configs, by the name of their setting."""
    return {f"{name}_id": token(text) for name, text in QWEN_TOKENS.items()}


IDEFICS = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 32, "patch_size": 8},
}
IDEFICS_IMAGES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
IDEFICS_TOKENS = {
    **{"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"},
    **{"end_of_utterance_token": "<end_of_utterance>"},
    **{f"row_{i}_col_{j}": f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)},
}

RECIPES: dict[str, Recipe] = {
    "llava": Recipe(
        lambda token: (
            {"text_config": LLAMA, "vision_config": SIGLIP, "image_token_index": token("<image>"), "image_seq_length": 16}
            | {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
        ),
        ("SiglipImageProcessorPil", {"size": {"height": 32, "width": 32}}),
        processor={"patch_size": 8, "vision_feature_select_strategy": "full"},
    ),
    "llava_onevision": Recipe(
        lambda token: (
            {"text_config": QWEN2, "vision_config": SIGLIP, "image_token_index": token("<image>")}
            | {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "image_grid_pinpoints": PINPOINTS}
        ),
        ("LlavaOnevisionImageProcessorPil", {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": PINPOINTS}),
        tokens={"image_token": "<image>", "video_token": "<video>"},
        processor={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_5_vl": Recipe(
        lambda token: (
            qwen_ids(token)
            | {
                "text_config": {**QWEN2, "model_type": "qwen2_5_vl_text", "rope_parameters": MROPE},
                "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
                | {"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]},
            }
        ),
        ("Qwen2VLImageProcessorPil", {"min_pixels": 256, "max_pixels": 1024, "patch_size": 8}),
        QWEN_TOKENS,
        QWEN_IMAGE,
    ),
    "qwen3_vl": Recipe(
        lambda token: (
            qwen_ids(token)
            | {
                "text_config": {**QWEN2, "model_type": "qwen3_vl_text", "rope_parameters": MROPE | {"mrope_interleaved": True}},
                "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
                | {"patch_size": 8, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
            }
        ),
        ("Qwen2VLImageProcessorPil", {"min_pixels": 256, "max_pixels": 1024, "patch_size": 8}),
        QWEN_TOKENS,
        QWEN_IMAGE,
    ),
    "idefics3": Recipe(
        lambda token: {"text_config": LLAMA, "vision_config": IDEFICS, "image_token_id": token("<image>"), "scale_factor": 2},
        ("Idefics3ImageProcessorPil", IDEFICS_IMAGES),
        IDEFICS_TOKENS,
        processor={"image_seq_len": 4},
    ),
    "smolvlm": Recipe(
        lambda token: {"text_config": LLAMA, "vision_config": IDEFICS, "image_token_id": token("<image>"), "scale_factor": 2},
        ("SmolVLMImageProcessorPil", IDEFICS_IMAGES),
        IDEFICS_TOKENS,
        processor={"image_seq_len": 4},
    ),
    "internvl": Recipe(
        lambda token: {
            "text_config": QWEN2,
            "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"image_size": [32, 32], "patch_size": [8, 8]},
            **{"image_token_id": token("<IMG_CONTEXT>"), "image_seq_length": 4},
        },
        ("GotOcr2ImageProcessorPil", {"size": {"height": 32, "width": 32}, "crop_to_patches": False}),
        {
            **{"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"},
            "video_token": "<video>",
        },
        "<IMG_CONTEXT>",
        {"image_seq_length": 4},
    ),
    "gemma3": Recipe(
        lambda token: {
            "text_config": {
                **LLAMA,
                "model_type": "gemma3_text",
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": SIGLIP,
            **{"mm_tokens_per_image": 4, "image_token_index": token("<image_soft_token>")},
            **{"boi_token_index": token("<start_of_image>"), "eoi_token_index": token("<end_of_image>")},
        },
        ("Gemma3ImageProcessorPil", {"size": {"height": 32, "width": 32}}),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        "<start_of_image>",
        {"image_seq_length": 4},
    ),
    "paligemma": Recipe(
        lambda token: {
            "text_config": {**LLAMA, "model_type": "gemma", "num_image_tokens": 16},
            "vision_config": {**SIGLIP, "projection_dim": 32},
            **{"image_token_index": token("<image>"), "projection_dim": 32, "hidden_size": 32},
        },
        ("SiglipImageProcessorPil", {"size": {"height": 32, "width": 32}, "image_seq_length": 16}),
        image=None,
    ),
    "minicpmv4_6": Recipe(
        lambda token: {
            "text_config": {**LLAMA, "model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]}
            | {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
            | {"rope_parameters": MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0}},
            "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"image_size": 64, "patch_size": 8},
            **{"insert_layer_id": 0, "image_size": 64, "image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>")},
        },
        ("MiniCPMV4_6ImageProcessorPil", {"scale_resolution": 32, "patch_size": 8, "max_slice_nums": 2}),
        {
            **{"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
            **{
                f"{name}_{edge}_token": f"<{'/' * (edge == 'end')}{name}>"
                for name in ("image", "slice", "image_id")
                for edge in ("start", "end")
            },
        },
        "<|image_pad|>",
    ),
}


def make(kind: str, folder: Path) -> None:
    """Write model, tokenizer and processor of a kind as a Transformers folder. The result is the same every time."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    recipe, processor_ = RECIPES[kind], processor(kind)
    tokens = processor_.tokenizer
    settings = recipe.config(tokens.convert_tokens_to_ids)
    settings["text_config"] = {**settings["text_config"], "vocab_size": len(tokens)}
    ends = {"pad_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id, "bos_token_id": tokens.bos_token_id}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                # Keeps the size of activations. With the usual 0.02, the outputs of so narrow a model would be close to zero.
                weight.normal_(std=weight[0].numel() ** -0.5)
    model.generation_config.update(**ends)
    model.save_pretrained(folder)
    processor_.save_pretrained(folder)


def processor(kind: str, changes: Mapping[str, Any] | None = None) -> Any:
    """Return the kind's processor, with the embedded model's vocabulary, its own special tokens and changes to the image processor's settings."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

    from fedmllm.models.processors import NoVideos, without_videos
    from fedmllm.models.source import model_source

    recipe = RECIPES[kind]
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_source("nano"),
        bos_token="<bos>",
        eos_token="<|im_end|>",
        extra_special_tokens={"turn_token": "<|im_start|>", **recipe.tokens},
    )
    name, settings = recipe.images
    parts = {
        "image_processor": getattr(transformers, name)(**settings | dict(changes or {})),
        "tokenizer": tokenizer,
        "video_processor": NoVideos(),
    }
    cls = without_videos(processor_class_from_name(PROCESSOR_MAPPING_NAMES[kind]))
    template = None if recipe.image is None else CHATML.replace("IMAGE", recipe.image)
    return cls(**{name: parts[name] for name in cls.get_attributes()}, chat_template=template, **recipe.processor)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
