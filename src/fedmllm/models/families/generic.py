"""The family for any ``AutoModelForImageTextToText`` model whose processor has a chat template."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmllm.data.images import open_image
from fedmllm.errors import ModelError
from fedmllm.types import Message, Modality

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "in_proj_qkv", "in_proj_z", "out_proj")
"""Names of attention projections: softmax attention, separate or fused, and linear attention in hybrid decoders."""
_LORA_TARGETS = {"attention": _ATTENTION, "all-linear": (*_ATTENTION, "gate_proj", "up_proj", "down_proj", "gate_up_proj")}
CONNECTORS = {"multi_modal_projector", "connector", "merger", "deepstack_merger_list", "resampler"}
"""Names of the modules between vision tower and decoder."""
_SLICES = ("max_slice_nums", "max_patches", "pan_and_scan_max_num_crops")
"""Names of the image processors' setting for the maximum number of slices."""


class ModelFamily:
    """Defines how messages become tensors and where LoRA attaches. A family is a subclass that overrides what differs."""

    modalities: tuple[Modality, ...] = ("image", "text")
    """The modalities that ``prompt_tensors`` supports."""
    auto_class: str = "AutoModelForImageTextToText"
    """Name of the Transformers class that loads the model."""
    axes: Mapping[str, int] = MappingProxyType({})
    """The axis along which ``batch`` concatenates a processor output, by name, if it is not the first."""
    answer_type: int = 0
    """The value of ``token_type_ids`` for the answer, if the processor returns them for the prompt."""

    def can_render(self, processor: ProcessorMixin) -> bool:
        """Return whether the chat template that ``render`` needs is available."""
        return getattr(processor, "chat_template", None) is not None

    def render(self, processor: ProcessorMixin, messages: Sequence[Message], answer: str) -> tuple[str, str]:
        """Return (prompt, completion) as rendered by the chat template. The completion is the answer with its end token.

        Control tokens in the data are escaped with ``defuse``.

        Raises:
            ModelError: if the rendered conversation does not begin with the generation prompt.
        """
        specials = special_tokens(processor)
        chat = [_as_chat(message, specials) for message in messages]
        return continued(processor, chat, {"role": "assistant", "content": [{"type": "text", "text": defuse(answer, specials)}]})

    def prompt_tensors(self, processor: ProcessorMixin, prompt: str, messages: Sequence[Message]) -> dict[str, Tensor]:
        """Return the processor's tensors for one prompt: ``input_ids`` of shape (1, length) and, with images, the tensors of the images.

        Raises:
            ModelError: if a message contains a modality that the family does not support.
        """
        self.require({part.type for message in messages for part in message.parts})
        images = [open_image(part.value) for message in messages for part in message.parts if part.type == "image"]
        tensors = processor(text=[prompt], images=images or None, return_tensors="pt", add_special_tokens=False)
        return {name: tensor for name, tensor in tensors.items() if name not in ("attention_mask", "labels")}

    def batch(self, extras: Sequence[Mapping[str, Tensor]], shifts: Sequence[int]) -> dict[str, Any]:
        """Combine the other tensors of several samples into those of one batch.

        Args:
            extras: for each sample, the tensors from ``prompt_tensors`` other than tokens, without pixels if cached features replace them.
            shifts: for each sample, the number of padding columns on its left.
        """
        names = sorted({name for sample in extras for name in sample})
        return {name: torch.cat([sample[name] for sample in extras if name in sample], self.axes.get(name, 0)) for name in names}

    def call(self, model: Any, inputs: Mapping[str, Any], **settings: Any) -> Any:
        """Run the model's forward pass on a batch."""
        return model(**inputs, **settings)

    def generate(self, model: Any, inputs: Mapping[str, Any], **settings: Any) -> Tensor:
        """Generate continuations of the prompts of a batch, shape (samples, new tokens)."""
        output: Tensor = model.generate(**inputs, **settings)
        return output[:, inputs["input_ids"].shape[1] :]

    def require(self, held: Collection[Modality]) -> None:
        """Check that the family supports the modalities, so that none is silently ignored.

        Raises:
            ModelError: if ``prompt_tensors`` does not support one of them.
        """
        if unread := sorted(set(held) - set(self.modalities)):
            raise ModelError(
                f"samples hold {' and '.join(unread)}, but the model supports only {' and '.join(self.modalities)}; "
                "remove that column, or write a family file for a model that supports it"
            )

    def lora_modules(self, model: nn.Module, targets: str) -> str:
        """Return a regular expression that matches the decoder's target modules and nothing in the vision tower."""
        decoder = model.get_decoder()  # type: ignore[operator]
        prefix = next(name for name, module in model.named_modules() if module is decoder)
        return rf"{prefix}\..*\.({'|'.join(_LORA_TARGETS[targets])})".replace(".", r"\.", prefix.count("."))

    def limit_slices(self, model: Any, processor: Any, count: int) -> bool:
        """Limit the number of slices into which the processor cuts an image, not counting the view of the whole image.

        Returns:
            whether the processor slices images at all.
        """
        images = processor.image_processor
        held = [name for name in _SLICES if getattr(images, name, None) is not None]
        for name in held:
            setattr(images, name, min(count, getattr(images, name)))
        return bool(held)

    def connector(self, model: nn.Module) -> list[str]:
        """Return the names of the modules between vision tower and decoder, none nested in another; empty if they are not known."""
        named, inside = dict(model.named_modules()), decoder_modules(model)
        found = [name for name, module in named.items() if name.rpartition(".")[2] in CONNECTORS and id(module) not in inside]
        # PEFT does not accept ModuleLists, so their children are named instead.
        lists = {name for name in found if isinstance(named[name], nn.ModuleList)}
        return [name for name in found if name not in lists] + [f"{name}.{i}" for name in lists for i, _ in named[name].named_children()]


def decoder_modules(model: Any) -> set[int]:
    """Return the ids of the decoder and all modules in it."""
    return set(map(id, model.get_decoder().modules()))


def without_adapters(model: Any) -> Any:
    """Return the Transformers model inside a PEFT model, or the model itself if it has no adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def continued(words: Any, chat: Sequence[Mapping[str, Any]], turn: Mapping[str, Any]) -> tuple[str, str]:
    """Return (prompt, completion) as rendered by the chat template of a processor or tokenizer.

    Args:
        words: the processor or tokenizer.
        chat: the messages of the prompt.
        turn: the assistant's message.

    Raises:
        ModelError: if the rendered conversation does not begin with the generation prompt.
    """
    prompt = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    whole = words.apply_chat_template([*chat, turn], add_generation_prompt=False, tokenize=False)
    if not whole.startswith(prompt):
        raise ModelError("the chat template's full conversation does not begin with its generation prompt; this model needs a family file")
    return prompt, whole.removeprefix(prompt).rstrip("\n")


def special_tokens(processor: ProcessorMixin) -> tuple[str, ...]:
    """Return the strings that the tokenizer reads as control tokens, including the image placeholder."""
    return tuple(sorted({*processor.tokenizer.all_special_tokens, *processor.tokenizer.get_added_vocab()}))


def _as_chat(message: Message, specials: Sequence[str]) -> dict[str, Any]:
    """Return a message in Transformers' chat format. Images are placeholders; the processor gets their content separately."""
    content = [
        {"type": "text", "text": defuse(str(part.value), specials)} if part.type == "text" else {"type": part.type}
        for part in message.parts
    ]
    return {"role": message.role, "content": content}


def defuse(text: str, specials: Sequence[str]) -> str:
    """Insert a space into every control token that data contain, so that text cannot act as an image or end a message."""
    for token in specials:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def restored(text: str, specials: Sequence[str]) -> str:
    """Undo ``defuse`` in the output of a model that was trained on defused answers."""
    for token in specials:
        text = text.replace(f"{token[0]} {token[1:]}", token) if len(token) > 1 else text
    return text
