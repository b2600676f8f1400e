"""A model with the interface of MiniCPM-V 2.6's own code, which cannot be downloaded here: ``forward(data, **kwargs)`` and a processor."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fedmllm.models.families import FAMILIES
from fedmllm.models.last_layer import narrow
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.source import model_source

PATCH, QUERIES, WIDTH = 8, 3, 32


class StandIn(nn.Module):
    """A decoder, and a vision part that makes three features of a slice of any size."""

    is_gradient_checkpointing = False

    def __init__(self, vocabulary: int, end: int) -> None:
        super().__init__()
        sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
        text = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, max_position_embeddings=512, **sizes)  # type: ignore[arg-type]
        self.llm = LlamaForCausalLM(text)
        self.vpm = nn.Linear(3 * PATCH * PATCH, WIDTH)
        self.resampler = nn.Linear(WIDTH, QUERIES * WIDTH)
        self.config = SimpleNamespace(model_type="minicpmv", get_text_config=lambda: text, to_dict=text.to_dict)
        self.generation_config = GenerationConfig(eos_token_id=end)

    def get_decoder(self) -> nn.Module:
        return self.llm

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_vllm_embedding(self, data: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        embedded = self.llm.get_input_embeddings()(data["input_ids"])
        seen: list[Tensor] = []
        for row, (slices, sizes, bounds) in enumerate(zip(data["pixel_values"], data["tgt_sizes"], data["image_bound"], strict=True)):
            for pixels, size, (first, last) in zip(slices, sizes, bounds, strict=True):
                patches = pixels.reshape(3, PATCH, int(size.prod()), PATCH).permute(2, 0, 1, 3).flatten(1)
                seen.append(self.resampler(self.vpm(patches).tanh().mean(0)).reshape(QUERIES, WIDTH))
                assert last - first == QUERIES
                embedded[row, first:last] = seen[-1]
        return embedded, seen

    def forward(self, data: dict[str, Any], **kwargs: Any) -> Any:
        embedded, _ = self.get_vllm_embedding(data)
        return self.llm(input_ids=None, position_ids=data["position_ids"], inputs_embeds=embedded, **kwargs)


class Resampler(nn.Module):
    """The published resampler's parameters: 64 queries that attend to patches of width 1,152."""

    def __init__(self, width: int, patches: int, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.kv_proj = nn.Linear(patches, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // 128)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(width, width))


def true_geometry() -> nn.Module:
    """Decoder and resampler in the sizes of MiniCPM-V 2.6, for the device ``meta``."""
    model = StandIn(8, 0)
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    model.llm = Qwen2ForCausalLM(Qwen2Config(vocab_size=151666, num_key_value_heads=4, **sizes))  # type: ignore[arg-type]
    model.resampler = Resampler(3584, 1152, 64)
    return model


class StandInProcessor:
    """Takes a text with ``(<image>./</image>)`` for each picture. A picture is one slice, a wide one two."""

    def __init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            model_source("nano"), extra_special_tokens={name: f"<{name}>" for name in ("image", "/image", "unk", "turn")}
        )
        self.tokenizer.chat_template = (
            "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
        )

    def __call__(self, text: str, images: list[Image.Image] | None = None, return_tensors: str = "pt") -> dict[str, Any]:
        if not images:
            return dict(self.tokenizer(text, add_special_tokens=False, return_tensors=return_tensors))
        assert text.count("(<image>./</image>)") == len(images)
        by_picture = [_slices(image) for image in images]
        marks = iter("<image>" + "<unk>" * QUERIES + "</image>" for slices in by_picture for _ in slices)
        counts = iter(map(len, by_picture))
        written = re.sub(r"\(<image>\./</image>\)", lambda _: "".join(next(marks) for _ in range(next(counts))), text)
        ids = torch.tensor(self.tokenizer(written, add_special_tokens=False)["input_ids"])
        first, last = (torch.where(ids == self.tokenizer.convert_tokens_to_ids(name))[0] for name in ("<image>", "</image>"))
        slices = [tensor for group in by_picture for tensor in group]
        sizes = torch.tensor([[1, tensor.shape[-1] // PATCH] for tensor in slices])
        return {"input_ids": ids[None], "pixel_values": [slices], "tgt_sizes": [sizes], "image_bound": [torch.stack([first + 1, last], 1)]}


def _slices(image: Image.Image) -> list[Tensor]:
    """The picture as four patches in a row and, if it is wide, its left half once more as two."""
    parts = [(image, 4), *([(image.crop((0, 0, image.width // 2, image.height)), 2)] if image.width > image.height else [])]
    return [torch.tensor(np.asarray(part.convert("RGB").resize((PATCH * n, PATCH))) / 255.0).float().permute(2, 0, 1) for part, n in parts]


def stand_in() -> VisionLanguageModel:
    """The model with reproducible random weights, as ``load_model`` would return it."""
    processor = StandInProcessor()
    torch.manual_seed(0)
    model = StandIn(len(processor.tokenizer), processor.tokenizer.eos_token_id)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight[0].numel() ** -0.5)
    narrow(model.requires_grad_(False).eval())
    return VisionLanguageModel("stand-in", model, processor, FAMILIES["minicpmv"], torch.device("cpu"), 512)
