"""The nano model's architecture, tokenizer and processor: an untrained LLaVA with 4.0 M parameters.

Image (64x64) -> SigLIP tower (16 patches) -> projector (16 visual tokens) -> Llama decoder. All classes come from
Transformers; only the sizes are specific to this model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 1024
IMAGE_SIZE = 64
PATCH_SIZE = 16
PAD, IMAGE, USER, ASSISTANT, END = "<pad>", "<image>", "<|user|>", "<|assistant|>", "<|end|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text, with a separate token for every decimal digit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe: Tokenizer = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, IMAGE, USER, ASSISTANT, END, "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=512,
        extra_special_tokens={"image_token": IMAGE},
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return a processor that scales images to 64x64 pixels in [-1, 1] and writes one ``<image>`` per visual token."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return a model with random weights from PyTorch's current generator."""
    vision = SiglipVisionConfig(
        hidden_size=144,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    text = LlamaConfig(
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    _scale_to_width(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@torch.no_grad()
def _scale_to_width(model: nn.Module) -> None:
    """Initialize weights with standard deviation 1 / sqrt(inputs), and embeddings with 0.1.

    The library's constant of 0.02 suits widths of thousands. At a width of 192 the signal from the image is then so weak
    that the model starts to read images only after several hundred steps, instead of about one hundred.
    """
    for name, parameter in model.named_parameters():
        if "position_embedding" in name or "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.1)
        elif "patch_embedding.weight" in name:
            nn.init.normal_(parameter, std=2 / math.sqrt(parameter[0].numel()))
        elif parameter.ndim == 2 and "vision_tower" not in name:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
    for layer in model.get_submodule("model.language_model.layers").children():
        _look_for_likeness(layer.get_submodule("self_attn"))


def _look_for_likeness(attention: nn.Module, correlation: float = 0.7) -> None:
    """Make keys similar to queries, so that tokens attend to equal tokens from the start, which comparing requires.

    This is the mimetic initialization of Trockman and Kolter (arXiv 2305.09828), with K = c Q + sqrt(1 - c^2) noise.
    """
    query, key = (attention.get_parameter(f"{name}_proj.weight") for name in "qk")
    key.mul_(math.sqrt(1 - correlation**2)).add_(query, alpha=correlation)
